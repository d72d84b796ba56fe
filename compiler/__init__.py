"""checkpoint -> bundle: stages, passes, the weight pack, engines. Nothing heavy is imported
here.
"""
