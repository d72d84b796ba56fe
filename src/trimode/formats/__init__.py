"""What outlives a process: the schemas of files, and how files are read and written. Nothing is
imported here.
"""
