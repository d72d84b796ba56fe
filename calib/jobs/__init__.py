"""Frames every job: scales, drafter and sampler.

- ``job``     the steps from the checks to the record
- ``work``    the work of an interrupted run, and the way to resume it
- ``records`` parts of the records that jobs write
"""
