"""What the training jobs have in common.

- ``prompts``: the data, split into parts that share nothing
- ``served``: the trunk with the weights of a bundle
- ``state``: what an interrupted run leaves behind
- ``training``: a training that can be interrupted
- ``records``: parts of what is written beside a result
- ``progress``: who is told what happens
"""
