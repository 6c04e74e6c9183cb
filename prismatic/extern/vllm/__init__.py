"""OpenVLA in vLLM: the model class and its inputs.

`register` is the entry point `vllm.general_plugins` of pyproject.toml, so that every process of an engine knows the
class. It replaces vLLM's own `OpenVLAForActionPrediction`, which takes only 224-pixel images and the two 7B ViTs.
"""

ARCHITECTURE = "OpenVLAForActionPrediction"


def register() -> None:
    """Tell vLLM about the model and its configuration class; may be repeated."""
    from vllm import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from prismatic.extern.vllm.openvla import OpenVLAForActionPrediction

    # The class, not its name: vLLM would look into a name in another process, which takes 30 s to import vLLM again.
    ModelRegistry.register_model(ARCHITECTURE, OpenVLAForActionPrediction)
    # vLLM prefers its own table to AutoConfig; there is no public way to replace an entry.
    _CONFIG_REGISTRY[OpenVLAConfig.model_type] = OpenVLAConfig
    if current_platform.is_cpu():
        from prismatic.extern.vllm.cpu_ops import register_cpu_ops

        register_cpu_ops()
    else:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(
            AttentionBackendEnum.FLASH_ATTN,
            "prismatic.extern.vllm.attention.PromptFlashAttentionBackend",
        )
