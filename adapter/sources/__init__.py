"""What a trainer holds -> (Hugging Face name, tensor) pairs, of which no more than a bucket is made whole at a time."""

from adapter.sources.experts import unstack_experts
from adapter.sources.lazy import LazyTensor, NamedTensors, PlainTensor, Sendable
from adapter.sources.lora import MergedLora, lora_adapter, merged_lora
from adapter.sources.module import NameMap, as_lazy, named_weights
from adapter.sources.tensor_parallel import Column, GatedColumn, GroupedQkv, Layout, Replicated, Row, join_shards

__all__ = [
    "Column",
    "GatedColumn",
    "GroupedQkv",
    "Layout",
    "LazyTensor",
    "MergedLora",
    "NameMap",
    "NamedTensors",
    "PlainTensor",
    "Replicated",
    "Row",
    "Sendable",
    "as_lazy",
    "join_shards",
    "lora_adapter",
    "merged_lora",
    "named_weights",
    "unstack_experts",
]
