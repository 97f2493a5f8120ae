//! Names of parameters inside a unit.

/// Fused q, k, v projection, `[(H + 2K) D, d]`.
pub const QKV: &str = "qkv.weight";
/// Its bias.
pub const QKV_BIAS: &str = "qkv.bias";
/// Output projection of the attention, `[d, H D]`.
pub const OUTPUT: &str = "output.weight";
/// Its bias.
pub const OUTPUT_BIAS: &str = "output.bias";
/// First MLP projection, `[2f, d]` (gate, then up) or `[f, d]`.
pub const UP: &str = "up.weight";
/// Its bias.
pub const UP_BIAS: &str = "up.bias";
/// Second MLP projection, `[d, f]`.
pub const DOWN: &str = "down.weight";
/// Its bias.
pub const DOWN_BIAS: &str = "down.bias";
/// Norm of the attention branch, `[d]`.
pub const NORM1: &str = "norm1.weight";
/// Its bias.
pub const NORM1_BIAS: &str = "norm1.bias";
/// Norm of the MLP branch, `[d]`.
pub const NORM2: &str = "norm2.weight";
/// Its bias.
pub const NORM2_BIAS: &str = "norm2.bias";
/// Token embedding, `[V, e]`; the head too if tied.
pub const EMBEDDING: &str = "embedding.weight";
/// Learned positions, `[positions, d]`.
pub const POSITIONS: &str = "positions.weight";
/// From the embedding's width to the hidden width, `[d, e]`.
pub const PROJECT_IN: &str = "project_in.weight";
/// From the hidden width to the embedding's, `[e, d]`.
pub const PROJECT_OUT: &str = "project_out.weight";
/// Norm before the head, `[d]`.
pub const FINAL_NORM: &str = "norm.weight";
/// Its bias.
pub const FINAL_NORM_BIAS: &str = "norm.bias";
/// Language head of its own, `[V, e]`.
pub const HEAD: &str = "head.weight";
/// Scalar head, `[1, e]`.
pub const SCORE: &str = "score.weight";

/// Adapter of the fused q, k, v projection: `A`, `[r, d]`.
pub const QKV_A: &str = "qkv.lora_a";
/// Its `B`, `[(H + 2K) D, r]`.
pub const QKV_B: &str = "qkv.lora_b";
/// Adapter of its query rows alone: `A`, `[r, d]`.
pub const QUERY_A: &str = "q.lora_a";
/// Its `B`, `[H D, r]`.
pub const QUERY_B: &str = "q.lora_b";
/// Adapter of its key rows alone: `A`, `[r, d]`.
pub const KEY_A: &str = "k.lora_a";
/// Its `B`, `[K D, r]`.
pub const KEY_B: &str = "k.lora_b";
/// Adapter of its value rows alone: `A`, `[r, d]`.
pub const VALUE_A: &str = "v.lora_a";
/// Its `B`, `[K D, r]`.
pub const VALUE_B: &str = "v.lora_b";
/// Adapter of the attention's output projection: `A`, `[r, H D]`.
pub const OUTPUT_A: &str = "output.lora_a";
/// Its `B`, `[d, r]`.
pub const OUTPUT_B: &str = "output.lora_b";
/// Adapter of the gate: `A`, `[r, d]`.
pub const GATE_A: &str = "gate.lora_a";
/// Its `B`, `[f, r]`.
pub const GATE_B: &str = "gate.lora_b";
/// Adapter of what the gate multiplies, or of the first MLP projection without a gate: `A`, `[r, d]`.
pub const UP_A: &str = "up.lora_a";
/// Its `B`, `[f, r]`.
pub const UP_B: &str = "up.lora_b";
/// Adapter of the second MLP projection: `A`, `[r, f]`.
pub const DOWN_A: &str = "down.lora_a";
/// Its `B`, `[d, r]`.
pub const DOWN_B: &str = "down.lora_b";
