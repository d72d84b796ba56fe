"""Finds the scales of a checkpoint's linear layers from texts.

- ``settings``        what a caller can choose
- ``layers``          which layers are quantized, and in what blocks
- ``layer_replay``    the model a decoder layer at a time: the recorded forwards go through one,
  then through the next
- ``statistics``      the layers' inputs by column and mode, and how much of a weight survives
- ``modelopt_inputs`` what ModelOpt is run on
- ``modelopt``        ModelOpt's part: configuration, the one place that imports it, and the scales
  it found
- ``work_folder``     what is done already, on disk
- ``job``             all of it in order
"""
