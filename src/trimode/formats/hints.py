"""Holds the commands that hints name, in full.

They can be typed as they stand, but for the words in capitals.
"""

BUILD = "`trimode build CHECKPOINT -o BUNDLE`"
REBUILD = "build the bundle again: `trimode build CHECKPOINT -o BUNDLE --force`"
"""A damaged bundle is not mended by adding to it: what has the right size counts as there."""
REBUILD_TARGET = (
    "build the bundle again: `trimode build CHECKPOINT -o BUNDLE --target NAME --force`"
)
ADD_TARGET = "build the target: `trimode build CHECKPOINT -o BUNDLE --target NAME`"
CALIBRATE = "`trimode calibrate CHECKPOINT --precision PRECISION --data PROMPTS.jsonl -o FOLDER`"
TRAIN_SAMPLER = (
    "train one with `trimode calibrate sampler CHECKPOINT --data PROMPTS.jsonl -o FOLDER`"
)
BENCH = "measure with `trimode bench BUNDLE`, which -o FILE writes to a file, too"
BENCH_BATCH = "measure with `trimode bench BUNDLE --batch 1,2,4,8`"
