"""Jobs that need data: scales, drafter, sampler, and what they cost. Nothing is imported here."""
