"""Jobs that need data: training objectives, the drafter adapter, the demo checkpoint. Nothing is imported here."""
