"""What to try, by the kind of the cause: one line each. Imports no framework."""

import re

# A pattern of a cause in words -> what to try; the first that fits. `{…}` are the pattern's groups.
ADVICE: tuple[tuple[str, str], ...] = (
    # Weights.
    (
        r"weights differ, so the twins were not given the same",
        "load one twin's into the other: outlook_parity.load_torch_weights(jax_model, torch_model)",
    ),
    (r"transposed", "a kernel of nnx.Linear is the transpose of torch.nn.Linear's weight: jax = torch.T"),
    (
        r"^weight .* in the order \[",
        "the parts of a fused weight are in another order: split it, and join it in torch's order",
    ),
    (
        r"has the values of (?P<other>\S+) there",
        "that weight was loaded from {other}: correct the name in the conversion",
    ),
    (r"^weight .*NaN or Inf", "the weights themselves are not finite: convert them again from their source"),
    (r"^weight .*missing in", "name its counterpart in [weights] of the map, or add it to the model that lacks it"),
    (r"^weight .*(?:reversed|shifted) ", "undo the flip or shift in the conversion of this weight"),
    (r"^weight .* times what torch has", "one conversion scales this weight: leave the factor out"),
    (r"^weight ", "convert it again, and compare with its source: outlook inspect a.safetensors b.safetensors"),
    # Functions and their arguments.
    (r"quick.?GELU", "quick GELU is x * jax.nn.sigmoid(1.702 * x), which is neither of jax.nn.gelu's"),
    (
        r"GELU tanh in jax",
        "jax.nn.gelu(x, approximate=False): JAX's default is the tanh approximation, PyTorch's is exact",
    ),
    (r"GELU exact in jax", "jax.nn.gelu(x, approximate=True), as torch.nn.GELU(approximate='tanh')"),
    (
        r"\b(?:activation|SiLU|ReLU|GELU|Mish|Hardswish)\b",
        "call the activation of the torch model; for GELU jax.nn.gelu(x, approximate=False)",
    ),
    (
        r"\beps\b .*, (?P<value>\S+) in torch",
        "give the JAX norm epsilon={value}: Flax's default is 1e-6, PyTorch's is 1e-5",
    ),
    (r"\beps\b", "give both norms one epsilon: Flax's default is 1e-6, PyTorch's is 1e-5"),
    (r"\bmomentum\b", "Flax's momentum is 1 minus PyTorch's: momentum=0.9 in Flax for 0.1 in PyTorch"),
    (r"biased variance", "keep n / (n - 1) times the batch's variance, or leave the level training out (--level)"),
    (r"as in eval mode", "pass the mode on to that module: train=, deterministic= or use_running_average="),
    (r"stale buffers", "train that twin in training mode, and write its new statistics back"),
    (r"\bvariance in one pass", "nnx.LayerNorm(..., use_fast_variance=False): in two passes, as PyTorch"),
    (r"\bdropout (?:rate|masks?)\b", "use one rate, and draw masks in the same places and order"),
    (
        r"\bpadding mode\b",
        "pad with jnp.pad(x, ..., mode=...) as torch's padding_mode says, and convolve with padding='VALID'",
    ),
    (
        r"\bpadding\b",
        "write padding as pairs, as in padding=((1, 1), (1, 1)): 'SAME' pads unevenly where the stride is not 1",
    ),
    (r"\bstrides?\b", "give the convolution torch's stride: strides= in Flax"),
    (r"\bdilation\b", "kernel_dilation= in Flax is torch's dilation="),
    (r"\bgroups\b", "feature_group_count= in Flax is torch's groups="),
    (r"\bkernel size\b", "give both twins one kernel size"),
    (r"\b(?:features|bias (?:True|False))\b", "build both twins from one configuration"),
    (r"\bpool divisor\b", "count_include_pad=False in flax.linen.avg_pool, or True in torch, in both alike"),
    (
        r"\binterpolation\b|\bscale of resizing\b",
        "jax.image.resize antialiases unless antialias=False; its cubic has a = -0.5, torch's -0.75 (cubic-pytorch)",
    ),
    (r"\bchannels per head\b", "give both twins one number of heads"),
    (r"\binterleav|\brotate", "rotate halves (x[..., :d // 2]) or neighbours (x[..., ::2]), in both twins alike"),
    (
        r"\bRoPE\b|\brotary\b|\btheta\b|\bbase\b",
        "pass the configuration's rope_theta to both: 10000 is only the default",
    ),
    (r"\bsliding window|\bwindow\b", "a window of w tokens is positions i - w + 1 to i, in both twins"),
    (r"\bmask value|\bmask\b", "mask with jnp.finfo(dtype).min in both, before the softmax, and by the same positions"),
    (r"\bsoftmax\b", "compute the softmax in one dtype in both twins, float32 as a rule"),
    (r"\bscale\b", "scale the scores by head_dim ** -0.5 in both, once"),
    (r"\bpositions?\b", "count positions from the same number in both twins; RoBERTa's begin behind the padding id"),
    (r"\b(?:heads|repeat|tile)\b", "jnp.repeat (head h reads group h // n), not jnp.tile (h % groups)"),
    # Precision.
    (r"as float32 inside", "compute in the wider of both: x.astype(jnp.promote_types(x.dtype, jnp.float32))"),
    (
        r"multiplies in full precision|\bprecision\b",
        "multiply alike: jax.default_matmul_precision('highest'), and no TF32 in torch",
    ),
    (r"errs as ", "find the cast that only one twin has: to bfloat16, float16 or by preferred_element_type"),
    # What is left.
    (
        r"NaN or Inf",
        "run that module alone on these inputs; often a division by zero, or a mask of -inf over a whole row",
    ),
    (
        r"called again|not deterministic",
        "look for state that a call leaves behind: caches, running statistics, random numbers",
    ),
    (r"gradients do not", "look for stop_gradient, detach, a custom_vjp or an in-place change in that module"),
    (
        r"only (?P<optimizer>SGD|AdamW) gives",
        "look for parameters that one twin freezes or ties: {optimizer} alone shows them",
    ),
    (r"training alone", "look at what differs in train mode: dropout, statistics, stochastic depth"),
    (r"missing in (?P<twin>torch|jax)", "return it from the {twin} model too, or compare the outputs that both have"),
    (r"shape \(", "compare the last axes: PyTorch has channels first, JAX last; [out_axes] of the map says so"),
    (r"the step (?P<step>\S+)", "compare the lines of both twins that compute the {step}"),
    (
        r"(?:times what torch has|in the order|the same numbers in another order|one number per channel)",
        "read that module in both twins: the words above say how its results differ",
    ),
    (
        r"its own code computes something else|gives something else|something else",
        "read the forward of that module in both twins line by line: its submodules agree",
    ),
)

_PATTERNS = tuple((re.compile(pattern, re.IGNORECASE), words) for pattern, words in ADVICE)

# Where nothing else fits, but a module is known.
_READ_IT = "read {path} in both twins line by line; `--level layers --verbose` shows its rows"


def advice(cause: str | None, path: str | None = None) -> str | None:
    """Return what to try, None if nothing is known.

    Args:
        cause: of a report, in words.
        path: of the module that is wrong first.
    """
    for pattern, words in _PATTERNS:
        if cause and (match := pattern.search(cause)):
            return (
                words.format_map({name: value or "" for name, value in match.groupdict().items()})
                if match.groupdict()
                else words
            )
    return _READ_IT.format(path=path) if path else None
