"""HER2 tumor segmentation with subtype balancing by generative models: one module per idea."""

import sys


def _one_line_for_ctrl_c(kind, error, trace, ordinary=sys.excepthook):
    """torch takes seconds to import: Ctrl-C meanwhile needs no traceback. Python then ends as by Ctrl-C."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted: nothing had begun", file=sys.stderr)
    else:
        ordinary(kind, error, trace)


sys.excepthook = _one_line_for_ctrl_c
