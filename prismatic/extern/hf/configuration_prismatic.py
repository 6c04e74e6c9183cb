"""The configuration of an OpenVLA policy, field for field as openvla/openvla-7b's `config.json` has it."""

from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

# timm names of each ViT, their activation overrides and their image sizes, by `vision_backbone_id`.
DINOSIGLIP_TIMM_IDS = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
VISION_BACKBONES: dict[str, tuple[list[str], list[str | None], list[int]]] = {
    "dinosiglip-vit-so-224px": (DINOSIGLIP_TIMM_IDS, [None, None], [224, 224]),
    "siglip-vit-so400m": (["vit_so400m_patch14_siglip_224"], [None], [224]),
    "dinov2-vit-l": (["vit_large_patch14_reg4_dinov2.lvd142m"], [None], [224]),
}


class OpenVLAConfig(PreTrainedConfig):
    """An OpenVLA policy: one or two timm ViTs, an MLP projector and a Llama.

    Defaults follow the class in openvla/openvla-7b (`image_resize_strategy` is `letterbox` here and `resize-naive` in
    that checkpoint's file). One field is ours: `timm_model_kwargs`, a dictionary for each ViT (`embed_dim`, `depth`,
    `num_heads`, `patch_size`, ...) passed to `timm.create_model`, which makes the same architecture at any size.
    Fields that we do not know (`auto_map`, `hf_llm_id`, ...) are kept and saved again.

    Raises ValueError when `vision_backbone_id` is unknown and `timm_model_ids` is not given, or when the lists that
    describe the ViTs differ in length.
    """

    model_type = "openvla"
    # Llama's "▁". Not a field of openvla-7b's file, so it is saved only where it differs (the tiny tokenizer).
    empty_piece_token_id = 29871
    sub_configs = {"text_config": LlamaConfig}

    def __init__(
        self,
        vision_backbone_id: str = "dinosiglip-vit-so-224px",
        llm_backbone_id: str = "llama2-7b-pure",
        arch_specifier: str = "no-align+fused-gelu-mlp",
        use_fused_vision_backbone: bool | None = None,
        image_resize_strategy: str = "letterbox",
        text_config: dict[str, Any] | LlamaConfig | None = None,
        timm_model_ids: list[str] | None = None,
        timm_override_act_layers: list[str | None] | None = None,
        image_sizes: list[int] | None = None,
        timm_model_kwargs: list[dict[str, Any]] | None = None,
        norm_stats: dict[str, Any] | None = None,
        n_action_bins: int = 256,
        llm_max_length: int = 2048,
        pad_token_id: int = 32000,
        pad_to_multiple_of: int = 64,
        output_projector_states: bool = False,
        **kwargs,
    ) -> None:
        if vision_backbone_id not in VISION_BACKBONES and timm_model_ids is None:
            raise ValueError(
                f"vision_backbone_id {vision_backbone_id!r} is unknown and timm_model_ids is not given: use one of "
                f"{sorted(VISION_BACKBONES)}, or give timm_model_ids, timm_override_act_layers and image_sizes"
            )
        known_ids, known_acts, known_sizes = VISION_BACKBONES.get(vision_backbone_id, ([], [], []))
        self.vision_backbone_id = vision_backbone_id
        self.llm_backbone_id = llm_backbone_id
        self.arch_specifier = arch_specifier
        self.image_resize_strategy = image_resize_strategy
        self.timm_model_ids = list(known_ids if timm_model_ids is None else timm_model_ids)
        num_vits = len(self.timm_model_ids)
        self.timm_override_act_layers = list(
            timm_override_act_layers or known_acts or [None] * num_vits
        )
        self.image_sizes = list(known_sizes if image_sizes is None else image_sizes)
        self.timm_model_kwargs = timm_model_kwargs
        self.use_fused_vision_backbone = (
            num_vits > 1 if use_fused_vision_backbone is None else use_fused_vision_backbone
        )
        self.norm_stats = norm_stats
        self.n_action_bins = n_action_bins
        self.llm_max_length = llm_max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.output_projector_states = output_projector_states
        self.text_config = _llama_config(text_config, pad_token_id)
        self._check_vision_lists(num_vits)
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
        self.pad_token_id = pad_token_id

    def to_dict(self) -> dict[str, Any]:
        """Return the fields to save.

        `timm_model_kwargs` is saved only where it is used, because openvla-7b's file does not have
        it. `text_config` has the rotary embedding twice: as `rope_parameters`, and as `rope_theta`
        and `rope_scaling` for transformers 4 (OpenVLA pins 4.40.1), where a missing `rope_theta`
        silently means 10000.
        """
        fields = super().to_dict()
        if fields.get("timm_model_kwargs") is None:
            fields.pop("timm_model_kwargs", None)
        if isinstance(text_config := fields.get("text_config"), dict):
            text_config.update(_older_rope_fields(text_config))
        return fields

    def _check_vision_lists(self, num_vits: int) -> None:
        lists: dict[str, list[Any]] = {
            "timm_override_act_layers": self.timm_override_act_layers,
            "image_sizes": self.image_sizes,
        }
        if self.timm_model_kwargs is not None:
            lists["timm_model_kwargs"] = self.timm_model_kwargs
        wrong = {name: len(value) for name, value in lists.items() if len(value) != num_vits}
        if wrong or num_vits != 1 + bool(self.use_fused_vision_backbone):
            raise ValueError(
                f"timm_model_ids names {num_vits} ViTs, use_fused_vision_backbone is {self.use_fused_vision_backbone} "
                f"and these lists have other lengths: {wrong}; give one entry for each ViT (two when fused, else one)"
            )

    @property
    def action_vocab_size(self) -> int:
        """Size of the vocabulary without the padding rows: action token ids end just below it (32000 for 7B)."""
        return self.text_config.vocab_size - self.pad_to_multiple_of

    @property
    def first_action_token_id(self) -> int:
        """The smallest action token id (31744 for 7B)."""
        return self.action_vocab_size - self.n_action_bins


def _llama_config(
    text_config: dict[str, Any] | LlamaConfig | None, pad_token_id: int
) -> LlamaConfig:
    """Build the Llama part; openvla-7b's file holds only `vocab_size` and lets the class give Llama-2-7B's shape."""
    if isinstance(text_config, LlamaConfig):
        return text_config
    fields = dict(text_config or {"vocab_size": pad_token_id + 64, "pad_token_id": pad_token_id})
    model_type = fields.pop("model_type", "llama")
    if model_type != "llama":
        raise ValueError(
            f"text_config.model_type is {model_type!r}: only 'llama' language models are supported"
        )
    if not fields.get("rope_parameters"):
        return LlamaConfig(**fields)
    # A file of ours has the older fields beside rope_parameters, and they say the same.
    older = {name: fields.pop(name, None) for name in ("rope_theta", "rope_scaling")}
    if older["rope_theta"] is not None and "rope_theta" not in fields["rope_parameters"]:
        fields["rope_theta"] = older["rope_theta"]
    config = LlamaConfig(**fields)
    derived = _older_rope_fields(config.to_dict())
    for name, value in older.items():
        if value is not None and _without_spelling(value) != _without_spelling(derived.get(name)):
            raise ValueError(
                f"text_config.{name} is {value}, which contradicts rope_parameters "
                f"{config.rope_parameters}: keep the one that the model was trained with and "
                "delete the other"
            )
    return config


def _without_spelling(value: Any) -> Any:
    """A rope_scaling with its type under the newer name and without theta; None for the default.

    Other values are returned as they are.
    """
    if not isinstance(value, dict):
        return value
    renamed = {"rope_type" if key == "type" else key: item for key, item in value.items()}
    renamed.pop("rope_theta", None)
    return None if renamed == {"rope_type": "default"} else renamed


def _older_rope_fields(text_config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` as transformers 4 has them, from `rope_parameters`.

    4.40.1 knows the types linear and dynamic, in exactly this form, and raises for others.
    """
    rope_parameters = dict(text_config.get("rope_parameters") or {})
    theta = rope_parameters.pop("rope_theta", None)
    rope_type = rope_parameters.get("rope_type", rope_parameters.get("type", "default"))
    older = {} if theta is None else {"rope_theta": theta}
    if rope_type in ("linear", "dynamic"):
        older["rope_scaling"] = {"type": rope_type, "factor": float(rope_parameters["factor"])}
    elif rope_type != "default":
        older["rope_scaling"] = rope_parameters
    return older
