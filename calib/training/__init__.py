"""What the training jobs have in common.

- ``budget``            how long to train
- ``objective``         what is trained for
- ``loop``              a training that can be interrupted
- ``run_state``         what an interrupted run leaves behind
- ``records``           parts of what is written beside a result
- ``checkpoint_writer`` checkpoints and adapters on disk
"""
