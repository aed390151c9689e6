"""The learning: configuration, data, packing, tasks, models, training, export.

Nothing heavy is imported here: `regraft --help` must answer at once.
"""

__version__ = "0.1.0"
