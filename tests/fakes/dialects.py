"""How SGLang's HTTP server differs by release, as far as updating weights goes.

Each fact was read in the released wheels, and all but the fatal ones are held against real servers by
``tests/conformance``.
"""

from dataclasses import dataclass

from packaging.version import Version

RELEASES = ("0.5.15.post1", "0.5.20", "0.5.21", "0.5.23")


@dataclass(frozen=True, slots=True)
class EngineDialect:
    """One release's ways."""

    release: str

    @property
    def has_sessions(self) -> bool:
        """begin_weight_update and end_weight_update exist, and loading must happen between them."""
        return self._since("0.5.21")

    @property
    def unknown_group_is_fatal(self) -> bool:
        """/update_weights_from_distributed with a group that was never made kills the server."""
        return not self._since("0.5.21")

    @property
    def checks_buckets_first(self) -> bool:
        """A bucket that nobody could receive is refused before the broadcast; older ones notice after it."""
        return self._since("0.5.23")

    @property
    def refused_flush_is_fatal(self) -> bool:
        """An update with flush_cache: true whose flush is refused kills the server, instead of a 400."""
        return not self._since("0.5.22")

    @property
    def waiting_blocks_flush(self) -> bool:
        """Requests that wait count as busy even while generation is paused."""
        return not self._since("0.5.21")

    @property
    def has_ready(self) -> bool:
        """GET /ready."""
        return self._since("0.5.20")

    @property
    def server_info_follows_the_disk(self) -> bool:
        """/server_info names the model and the format that were loaded last; later only /model_info does."""
        return not self._since("0.5.20")

    @property
    def has_version_spans(self) -> bool:
        """meta_info.weight_versions tells which tokens were made by which version."""
        return self._since("0.5.19")

    @property
    def checksums_on_cpu(self) -> bool:
        """/weights_checker works without a GPU; older ones call torch.cuda.synchronize."""
        return self._since("0.5.23")

    @property
    def places_by_role(self) -> bool:
        """/weights_checker lists a rank's places, one for each model runner; older ones name the target's alone."""
        return self._since("0.5.21")

    @property
    def has_engine_checksum(self) -> bool:
        """/weights_checker sums all ranks up."""
        return self._since("0.5.13")

    @property
    def lora_by_rank(self) -> bool:
        """/load_lora_adapter_from_tensors takes a payload per TP rank; older ones take one for all."""
        return self._since("0.5.17")

    def not_received(self, problem: str) -> str:
        """How it says that a bucket did not come over a group; older ones do not tell that from half a load."""
        if self._since("0.5.21"):
            return f"Failed to receive weights: {problem}"
        fear = "The full weights of the ModelRunner are partially updated. Please discard the whole weights."
        return f"Failed to update parameter online: {problem}. {fear}"

    def model_info(self) -> dict[str, object]:
        """Fields of /model_info that exist in this release, with a small Qwen3's values."""
        info: dict[str, object] = {
            "tokenizer_path": "/models/tiny-qwen3",
            "is_generation": True,
            "preferred_sampling_params": None,
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
        }
        if self._since("0.5.18"):
            info |= {"served_model_name": "/models/tiny-qwen3"}
            info |= {"reasoning_parser": None, "tool_call_parser": None}
        return info

    def server_info(self) -> dict[str, object]:
        """Fields of /server_info that exist in this release, with what does not depend on the engine's settings."""
        info: dict[str, object] = {
            "served_model_name": "/models/tiny-qwen3",
            "pp_size": 1,
            "dp_size": 1,
            "ep_size": 1,
            "nnodes": 1,
            "base_gpu_id": 0,
            "gpu_id_step": 1,
            "use_ray": False,
            "enable_dp_attention": False,
            "tokenizer_worker_num": 1,
            "quantization": None,
            "speculative_algorithm": None,
            "enable_lora": None,
            "status": "ready",
            "version": self.release,
        }
        if self._since("0.5.17"):
            info["weight_cache_mode"] = "off"
        if self._since("0.5.21"):
            info["frontend"] = "python"
        if self._since("0.5.22"):
            info["attn_dp_size"] = 1
        return info

    def _since(self, release: str) -> bool:
        return Version(self.release) >= Version(release)
