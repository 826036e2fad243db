"""The names of other libraries, computed here: each module has the functions of one, with its arguments.

Import the module of the library in use, `from logitless.integrations import trl`: none is imported on its own.
"""
