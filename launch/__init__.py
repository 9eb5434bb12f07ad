"""In a clone, `python -m launch.sweep` and its like: the commands of marginface.launch."""

import marginface.launch

__path__ = marginface.launch.__path__
