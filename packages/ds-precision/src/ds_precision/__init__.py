"""Number formats and the matrix products of DeepSeek-V3."""

from ds_precision.block_scaling import BlockScaled, dequantize_blocks, quantize_blocks
from ds_precision.choice import stock_operations, traced_for_xla, use_kernels
from ds_precision.deferred import (
    WeightGradients,
    defer_weight_gradients,
    deferred_weight_gradients,
)
from ds_precision.formats import (
    E4M3,
    E5M2,
    E5M6,
    Format,
    cast,
    from_ue8m0,
    pack_bits,
    to_ue8m0,
    unpack_bits,
)
from ds_precision.fp8 import (
    Fp8Policy,
    Fp8Recipe,
    RestoresPolicy,
    fp8_matmul,
    fp8_recipe,
    watch_fp8,
    without_fp8,
)
from ds_precision.fused import (
    AdamWUpdate,
    fused_adamw,
    fused_cross_entropy,
    fused_rms_norm,
    fused_square_sum,
)
from ds_precision.latent_attention import fused_latent_attention, fused_paged_attention
from ds_precision.linear import Linear, matmul
from ds_precision.products import (
    AttentionDone,
    ExpertsDone,
    attention_done,
    experts_done,
    fused_attention,
    fused_experts,
    fused_experts_deferring,
)
from ds_precision.routing import fused_routing
from ds_precision.weight_only import (
    MODES,
    QuantizedWeights,
    check_mode,
    exchange_weight,
    quantize_weights,
    replace_weights,
    takes_any_mode,
)

__all__ = [
    "E4M3",
    "E5M2",
    "E5M6",
    "MODES",
    "AdamWUpdate",
    "AttentionDone",
    "BlockScaled",
    "ExpertsDone",
    "Format",
    "Fp8Policy",
    "Fp8Recipe",
    "Linear",
    "QuantizedWeights",
    "RestoresPolicy",
    "WeightGradients",
    "attention_done",
    "cast",
    "check_mode",
    "defer_weight_gradients",
    "deferred_weight_gradients",
    "dequantize_blocks",
    "exchange_weight",
    "experts_done",
    "fp8_matmul",
    "fp8_recipe",
    "from_ue8m0",
    "fused_adamw",
    "fused_attention",
    "fused_cross_entropy",
    "fused_experts",
    "fused_experts_deferring",
    "fused_latent_attention",
    "fused_paged_attention",
    "fused_rms_norm",
    "fused_routing",
    "fused_square_sum",
    "matmul",
    "pack_bits",
    "quantize_blocks",
    "quantize_weights",
    "replace_weights",
    "stock_operations",
    "takes_any_mode",
    "to_ue8m0",
    "traced_for_xla",
    "unpack_bits",
    "use_kernels",
    "watch_fp8",
    "without_fp8",
]
