"""Settings by what they were measured for; docs/quality.md and docs/experts-grow.md say how good they are."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Several domains at once: dense, so that each token weighs many small experts, and as loud as a LoRA of rank E*r.
    "multi-domain": {
        "r": 4,
        "lora_alpha": 8,
        "num_experts": 16,
        "top_k_experts": 16,
        "routing_scale": 16.0,
        "router_temperature": 1.0,
        "expert_capacity_factor": None,
    },
    # No routing: constant weights, which train the LoRA of rank E*r and merge into the base model like one.
    "mergeable": {"r": 8, "lora_alpha": 16, "num_experts": 8, "router_type": "fixed", "routing_scale": 8.0},
    # One domain after another, each with experts of its own: `moelora train --grow`.
    "continual": {"r": 4, "lora_alpha": 8, "num_experts": 4, "top_k_experts": 2, "routing_scale": 4.0},
}
