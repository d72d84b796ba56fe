"""The stages of a build, one a file; :mod:`trimode.compiler.pipeline` has their order."""
