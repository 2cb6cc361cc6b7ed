"""Runs an exported folder: sessions, the KV cache, generation."""

from trianglemix.runtime.generate import Generation
from trianglemix.runtime.kv_cache import KVCache
from trianglemix.runtime.result import GenerationResult, Token
from trianglemix.runtime.sampling import GREEDY, Sampling
from trianglemix.runtime.session import TriangleSession

__all__ = [
    "GREEDY",
    "Generation",
    "GenerationResult",
    "KVCache",
    "Sampling",
    "Token",
    "TriangleSession",
]
