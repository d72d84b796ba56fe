"""From records to pages and pictures. Nothing is imported here."""
