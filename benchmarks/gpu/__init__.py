"""What only a GPU can answer, one script a question; each runs small on a CPU, too, to prove the
script.
"""
