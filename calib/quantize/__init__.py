"""The calibration job: a checkpoint and texts in, the scales of its linear layers out.

- ``settings``      what a caller can choose
- ``texts``         the prompts that are run, checked and drawn
- ``workload``      what the layers see: decoded by the runtime's own algorithms, recorded, and how it is replayed
- ``layers``        which layers are quantized, and in what blocks
- ``parts``         the model a decoder layer at a time: the recorded forwards go through one, then through the next
- ``statistics``    the layers' inputs by column and mode, and how much of a weight survives
- ``feed``          what ModelOpt is run on
- ``modelopt_job``  ModelOpt's part: configuration, and the one place that imports it
- ``extract``       from ModelOpt's modules to the arrays of :mod:`trimode.graphs.calibration`
- ``work``          what is done already, on disk
- ``job``           all of it in order
"""
