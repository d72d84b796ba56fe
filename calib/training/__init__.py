"""Trains drafters and samplers in the same steps.

- ``budget``            duration of a training, and its learning rate
- ``objective``         the joint objective
- ``optimizer``         the step of every training
- ``loop``              a training that can be interrupted
- ``run_state``         the work of a training, in a file
- ``settings``          settings of every training
- ``job``               steps of every training
- ``checkpoint_writer`` checkpoints and adapters on disk
"""
