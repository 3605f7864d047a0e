"""ERC-SVD compression of language models, served by stock vLLM.

Only the version lives here: every vLLM process imports this package.
"""

__version__ = "0.1.0"
