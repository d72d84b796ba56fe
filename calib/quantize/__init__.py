"""The calibration job: a checkpoint and texts in, the scales of its linear layers out.

- ``settings``      what a caller can choose
- ``texts``         the prompts that are run, checked and drawn
- ``workload``      what the layers see: decoded by the runtime's own algorithms, recorded, and replayed as often as needed
- ``statistics``    the layers' inputs by mode, and how much of a weight survives
- ``modelopt_job``  ModelOpt's part: configuration, and the one place that imports it
- ``extract``       from ModelOpt's modules to the arrays of :mod:`trimode.graphs.calibration`
- ``job``           all of it in order
"""
