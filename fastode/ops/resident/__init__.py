"""The resident CPU engine: a whole block in one operator, sample by sample, while a sample stays in the cache.

README.md beside this file says how it works and what it stores.
"""

from .autograd import ResidentIESkipFunction, ResidentShuOsherFunction
from .call import why_not

__all__ = ["ResidentIESkipFunction", "ResidentShuOsherFunction", "why_not"]
