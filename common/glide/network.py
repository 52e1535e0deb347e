"""GLIDE's two networks, and what their weights are called. Both see text through a tower of their own.

The U-Net is diffusers' UNet2DConditionModel: with its weights under other names it computes the same function.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Text = tuple[Tensor, Tensor]  # of B prompts: states [B, 128, W], vector [B, 4 C]


@dataclass(frozen=True)
class Settings:
    """Sizes of one network."""

    inputs: int  # channels: 3, with the enlarged small image 6
    widths: tuple[int, ...]  # channels of each level of the U-Net, finest first
    attention: tuple[bool, ...]  # which levels attend, to themselves and the text
    layers: int  # residual blocks of a level
    head: int = 64  # channels of an attention head of the U-Net
    text_width: int = 512
    text_layers: int = 16
    text_heads: int = 8
    vocabulary: int = 50257
    context: int = 128  # tokens of a prompt


BASE = Settings(3, (192, 384, 576, 768), (False, True, True, True), layers=3)  # 385.0 M parameters
UPSAMPLER = Settings(6, (192, 192, 384, 384, 768, 768), (False, False, False, True, True, True), layers=2)  # 398.4 M


class TextLayer(nn.Module):
    """Pre-norm attention without a mask, and a perceptron. Rows of c_qkv are q, k, v of head 0, then of head 1 ..."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict(dict(c_qkv=nn.Linear(width, 3 * width), c_proj=nn.Linear(width, width)))
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(width, 4 * width), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["c_qkv"](self.ln_1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, L, 3 d]
        x = x + self.attn["c_proj"](F.scaled_dot_product_attention(*qkv.chunk(3, -1)).transpose(1, 2).flatten(2))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class TextTower(nn.Module):
    """Ids [B, 128], mask [B, 128] -> states [B, 128, W] and vector [B, 4 C]. Modules have their official names."""

    def __init__(self, s: Settings):
        super().__init__()
        self.token_embedding = nn.Embedding(s.vocabulary, s.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(s.context, s.text_width))
        self.padding_embedding = nn.Parameter(torch.empty(s.context, s.text_width))
        layers = nn.ModuleList(TextLayer(s.text_width, s.text_heads) for _ in range(s.text_layers))
        self.transformer = nn.ModuleDict(dict(resblocks=layers))
        self.final_ln = nn.LayerNorm(s.text_width)
        self.transformer_proj = nn.Linear(s.text_width, 4 * s.widths[0])

    def forward(self, ids: Tensor, mask: Tensor) -> Text:
        x = torch.where(mask[..., None], self.token_embedding(ids) + self.positional_embedding, self.padding_embedding)
        for layer in self.transformer["resblocks"]:
            x = layer(x)
        x = self.final_ln(x)
        return x, self.transformer_proj(x[:, -1])  # the last place, mostly padding: nothing hides it from the words


class GlideNet(nn.Module):
    """Noisy images and text -> eps and v, the noise and the learned variance."""

    def __init__(self, s: Settings):
        from diffusers import UNet2DConditionModel

        super().__init__()
        kinds = {False: "Resnet{}sampleBlock2D", True: "SimpleCrossAttn{}Block2D"}
        self.settings = s
        self.text = TextTower(s)
        self.unet = UNet2DConditionModel(
            in_channels=s.inputs,
            out_channels=6,
            block_out_channels=s.widths,
            layers_per_block=s.layers,
            down_block_types=[kinds[attends].format("Down") for attends in s.attention],
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=[kinds[attends].format("Up") for attends in reversed(s.attention)],
            resnet_time_scale_shift="scale_shift",
            attention_head_dim=s.head,
            cross_attention_dim=s.text_width,
            class_embed_type="identity",  # the text's vector is added to the embedding of the time
        )

    def encode(self, ids: Tensor, mask: Tensor) -> Text:
        """What forward takes as text; once per prompt, where the official code runs the tower in every step."""
        states, vector = self.text(ids, mask)
        dtype = self.unet.conv_in.weight.dtype
        return states.to(dtype), vector.to(dtype)

    def forward(self, x: Tensor, t: int | Tensor, text: Text, low: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, 3, H, W], t of 0 .. 999 (one, or [B]), low: small images [B, 3, h, w] in [-1, 1], for the upsampler.

        -> eps and v, float32 [B, 3, H, W] each. v in [-1, 1] lies between the smallest and the largest log variance.
        """
        if low is not None:
            x = torch.cat([x, F.interpolate(low, x.shape[-2:], mode="bilinear", align_corners=False)], 1)
        states, vector = text
        t = torch.as_tensor(t, device=x.device)  # a number would be a constant to torch.compile
        out = self.unet(x.to(states.dtype), t, encoder_hidden_states=states, class_labels=vector).sample
        eps, v = out.float().chunk(2, 1)
        return eps, v

    def lower(self, dtype: torch.dtype) -> None:
        """The U-Net in dtype, but normalisation and the last convolution in float32, like the authors' float16."""
        nn.Module.to(self.unet, dtype, memory_format=torch.channels_last)  # diffusers' own warns for nothing
        last = [self.unet.conv_norm_out, self.unet.conv_out]
        for module in self.unet.modules():
            if isinstance(module, nn.GroupNorm) or module in last:
                module.float().register_forward_pre_hook(lambda _, args: (args[0].float(),))
                if module not in last:
                    module.register_forward_hook(lambda _, args, out: out.to(dtype))


# ---------------------------------------------------------------------------------------
# Official names of weights -> those of diffusers.

PLAIN = {"": ("",)}
RESIDUAL = {
    ".in_layers.0": (".norm1",),
    ".in_layers.2": (".conv1",),
    ".emb_layers.1": (".time_emb_proj",),
    ".out_layers.0": (".norm2",),
    ".out_layers.3": (".conv2",),
    ".skip_connection": (".conv_shortcut",),
}
ATTENTION = {  # several names: their rows are interleaved head by head in the official weight
    ".norm": (".group_norm",),
    ".qkv": (".to_q", ".to_k", ".to_v"),
    ".encoder_kv": (".add_k_proj", ".add_v_proj"),
    ".proj_out": (".to_out.0",),
}


def unet_blocks(s: Settings) -> Iterator[tuple[str, str, dict]]:
    """(official name, name in diffusers, names of the parts) of every block of the U-Net."""
    yield from (("time_embed.0", "time_embedding.linear_1", PLAIN), ("time_embed.2", "time_embedding.linear_2", PLAIN))
    yield from (("out.0", "conv_norm_out", PLAIN), ("out.2", "conv_out", PLAIN), ("input_blocks.0.0", "conv_in", PLAIN))
    for i, part in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{i}", f"mid_block.{part}", ATTENTION if i == 1 else RESIDUAL

    # One official list for all levels, in order. Going down, the change of size is an entry of its own ...
    coarsest, n = len(s.widths) - 1, 1
    for i, attends in enumerate(s.attention):
        for j in range(s.layers):
            yield f"input_blocks.{n + j}.0", f"down_blocks.{i}.resnets.{j}", RESIDUAL
            if attends:
                yield f"input_blocks.{n + j}.1", f"down_blocks.{i}.attentions.{j}", ATTENTION
        if i < coarsest:
            yield f"input_blocks.{n + s.layers}.0", f"down_blocks.{i}.downsamplers.0", RESIDUAL
        n += s.layers + 1

    # ... going up, it is the last part of a level's last entry.
    for i, attends in enumerate(reversed(s.attention)):
        n = i * (s.layers + 1)
        for j in range(s.layers + 1):
            yield f"output_blocks.{n + j}.0", f"up_blocks.{i}.resnets.{j}", RESIDUAL
            if attends:
                yield f"output_blocks.{n + j}.1", f"up_blocks.{i}.attentions.{j}", ATTENTION
        if i < coarsest:
            yield f"output_blocks.{n + s.layers}.{1 + attends}", f"up_blocks.{i}.upsamplers.0", RESIDUAL


def renamed(state: Mapping[str, Tensor], s: Settings) -> dict[str, Tensor]:
    """Weights under their official names -> under those of GlideNet."""
    modules = {old + a: [f"unet.{new}{b}" for b in bs] for old, new, parts in unet_blocks(s) for a, bs in parts.items()}
    found = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        names = modules.get(module, [f"text.{module}" if module else "text"])
        if tensor.dim() == 3:
            tensor = tensor[..., 0]  # attention's projections are convolutions of width 1
        if len(names) > 1:
            parts = tensor.unflatten(0, (-1, len(names), s.head)).unbind(1)  # [heads, d, ...] each
            found.update((f"{name}.{leaf}", part.flatten(0, 1)) for name, part in zip(names, parts, strict=True))
        else:
            found[f"{names[0]}.{leaf}"] = tensor
    return found


def read_settings(state: Mapping[str, Tensor]) -> Settings:
    """Sizes from the shapes of official weights. Heads do not show in them: 64 channels each, 8 in the text tower,
    or what a network for tests, narrower than that, can have. Raises KeyError for other weights."""
    entries = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("output_blocks.")), default=-1)
    # The last entry of each level but the finest ends with a change of size: a second residual block.
    grows = [n for n in range(entries) if {f"output_blocks.{n}.{i}.in_layers.0.weight" for i in (1, 2)} & state.keys()]
    ends = [*grows, entries - 1][::-1]
    context, text_width = state["positional_embedding"].shape
    widths = tuple(len(state[f"output_blocks.{n}.0.out_layers.3.weight"]) for n in ends)
    return Settings(
        inputs=state["input_blocks.0.0.weight"].shape[1],
        widths=widths,
        attention=tuple(f"output_blocks.{n}.1.qkv.weight" in state for n in ends),
        layers=ends[-1],
        head=min(64, widths[0]),
        text_width=text_width,
        text_layers=sum(key.endswith(".ln_1.weight") for key in state),
        text_heads=max(1, min(8, text_width // 8)),
        vocabulary=len(state["token_embedding.weight"]),
        context=context,
    )
