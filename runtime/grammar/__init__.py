"""Makes answers follow a grammar.

A grammar is a JSON schema, a regular expression, choices, or Lark rules.
"""
