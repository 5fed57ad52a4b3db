"""A pathway of few tokens for each task, beside a frozen vision transformer: nothing learned later touches it.

De Min et al., Less is more: Summarizing Patch Tokens for efficient Multi-Label Class-Incremental Learning
(arXiv:2405.15633), MULTI-LANE, with the details of the authors' code (tdemin16/multi-lane). The frozen stream runs as
usual. Beside it each task has a class token and selectors, which in each layer take up a summary of the frozen tokens
(softmax over all of them, of one head as wide as the layer, without maps) and run through the same frozen layer, with
prompts of the task ahead of its keys and values in the first layers. "Drop and replace": what goes on is the attention
output of the class token, and the normed selectors themselves. Class tokens of the last layer are brought to length 1
and read by one linear layer, of which each task keeps its own classes; logits of other tasks are replaced by 0 ahead of
the loss, so their rows get no gradient.

Deviations: the model is told of a new task by `begin`; take a fresh optimiser without weight decay for each, as the
code does, since old momentum would move the rows of earlier tasks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel
from transformers.modeling_outputs import ImageClassifierOutput


class MultiLaneConfig(PreTrainedConfig):
    """tasks: how many classes each has, in order. prompts: of a task in each of the first `prompted` layers.

    single: a picture has one class, and the loss is the cross entropy among the task's classes. replace: drop and
    replace; without it a summary is taken in the first layer only.
    """

    model_type = "regard_multi_lane"
    sub_configs = {"backbone": ViTConfig}  # type: ignore[assignment]  # noqa: RUF012  # as transformers has it

    def __init__(
        self,
        backbone: ViTConfig | dict[str, Any] | None = None,
        tasks: tuple[int, ...] = (10,),
        selectors: int = 20,
        prompts: int = 20,
        prompted: int = 5,
        replace: bool = True,
        single: bool = False,
        **kwargs: Any,
    ) -> None:
        self.backbone = ViTConfig(**backbone) if isinstance(backbone, dict) else backbone or ViTConfig()
        self.tasks = tuple(tasks)
        if not self.tasks or min(self.tasks) < 1 or selectors < 1:
            raise ValueError(
                f"MultiLaneConfig: each task has a class or more, and one selector or more; got {tasks}, {selectors}"
            )
        self.selectors, self.prompts, self.prompted = selectors, prompts, prompted
        self.replace, self.single = replace, single
        super().__init__(**kwargs)


class SummaryAttention(nn.Module):
    """What selectors take up of the frozen tokens: their mean, by the softmax of plain products."""

    is_cross_attention = True

    def forward(self, selectors: Tensor, tokens: Tensor) -> Tensor:
        """selectors [batch, query, dim], tokens [batch, key, dim] -> [batch, query, dim]"""
        return (selectors @ tokens.mT * tokens.shape[-1] ** -0.5).softmax(-1) @ tokens


class LaneAttention(nn.Module):
    """Attention of a pathway's tokens among themselves and to the prompts, by the maps of a frozen layer."""

    is_cross_attention = True  # prompts are keys, not queries

    def forward(self, maps: nn.Module, hidden: Tensor, prompts: Tensor | None) -> Tensor:
        """hidden [batch, token, dim], prompts [2, batch, prompt, head, dim] -> [batch, token, dim]"""
        heads = cast(int, maps.num_attention_heads)
        query, key, value = (
            cast(nn.Module, part)(hidden).unflatten(-1, (heads, -1)) for part in (maps.q_proj, maps.k_proj, maps.v_proj)
        )
        if prompts is not None:
            key, value = torch.cat([prompts[0], key], 1), torch.cat([prompts[1], value], 1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        return cast(nn.Module, maps.o_proj)((weights @ value).transpose(1, 2).flatten(2))


class SummarisedAttention(nn.Module):
    """One layer of the pathways beside a frozen layer of the backbone, which is not part of it."""

    def __init__(self, *, summary: bool = True, replace: bool = True) -> None:
        super().__init__()
        self.summary = SummaryAttention() if summary else None
        self.attention = LaneAttention()
        self.replace = replace

    def forward(self, layer: nn.Module, tokens: Tensor, lanes: Tensor, prompts: Tensor | None = None) -> Tensor:
        """layer: a ViTLayer; tokens: what the frozen layer is given [batch, key, dim], no gradient goes there; lanes:
        [task, batch, 1 + selector, dim]; prompts: [2, task, prompt, head, dim] -> lanes, as the layer leaves them
        """
        kind = cast(Any, layer)
        tasks, batch = lanes.shape[:2]
        normed, z = kind.layernorm_before(tokens.detach()), kind.layernorm_before(lanes).flatten(0, 1)
        selectors = taken = z[:, 1:]
        if self.summary is not None:
            taken = self.summary(selectors, normed.repeat(tasks, 1, 1))
        if prompts is not None:
            prompts = prompts.repeat_interleave(batch, 1)
        output = self.attention(kind.attention, torch.cat([z[:, :1], taken], 1), prompts)
        if self.replace:
            output = torch.cat([output[:, :1], selectors], 1)
        lanes = lanes + output.unflatten(0, (tasks, batch))
        return lanes + kind.mlp(kind.layernorm_after(lanes))


class MultiLane(PreTrainedModel):
    """Scores of all classes of the tasks begun so far, by a pathway for each. [batch, class]

    In training the newest pathway runs alone, otherwise all of them. `regard.record` sees the frozen layers, and of the
    pathways two cross sites a layer, a row of their batch for each task and picture.

    >>> import torch
    >>> from transformers import ViTConfig, ViTModel
    >>> from regard.models.multi_lane import multi_lane
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    >>> model = multi_lane(ViTModel(ViTConfig(image_size=16, patch_size=4, **sizes)), tasks=(2, 3), selectors=4)
    >>> model.begin(0)
    >>> model(torch.rand(1, 3, 16, 16)).logits.shape
    torch.Size([1, 2])
    """

    config_class = MultiLaneConfig
    main_input_name = "pixel_values"
    newest: Tensor

    def __init__(self, config: MultiLaneConfig) -> None:
        super().__init__(config)
        c, sizes = config, config.backbone
        self.backbone = ViTModel(sizes, add_pooling_layer=False).requires_grad_(False)
        depth, dim, heads = sizes.num_hidden_layers, sizes.hidden_size, sizes.num_attention_heads
        self.lanes = nn.ModuleList(
            SummarisedAttention(summary=c.replace or not i, replace=c.replace) for i in range(depth)
        )
        self.selectors = nn.Parameter(torch.empty(len(c.tasks), c.selectors, dim))
        self.prompts = nn.Parameter(
            torch.empty(min(c.prompted, depth), 2, len(c.tasks), c.prompts, heads, dim // heads)
        )
        self.head = nn.Linear(dim, sum(c.tasks))
        self.register_buffer("newest", torch.tensor(-1))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            for part in (*self.selectors, *self.prompts.flatten(0, 2)):
                if part.numel():
                    nn.init.orthogonal_(part.data.flatten(1))
        if module is self.head:
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def begin(self, task: int) -> None:
        """The next task: its selectors and prompts start as copies of those of the one before.

        Raises ValueError for any task but the one after the newest.
        """
        if task != int(self.newest) + 1 or task >= len(self.config.tasks):
            raise ValueError(
                f"MultiLane: tasks begin in order, {len(self.config.tasks)} of them from 0; the newest is "
                f"{int(self.newest)}, asked for {task}"
            )
        if task:
            with torch.no_grad():
                self.selectors[task] = self.selectors[task - 1]
                self.prompts[:, :, task] = self.prompts[:, :, task - 1]
        self.newest.fill_(task)

    def classes(self, task: int) -> slice:
        """Which columns of the logits are this task's."""
        start = sum(self.config.tasks[:task])
        return slice(start, start + self.config.tasks[task])

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        stream: Tensor | None = None,
        **_: Any,
    ) -> ImageClassifierOutput:
        """pixel_values: [batch, channel, row, column], or the `stream` made of them, where pictures are seen again.

        labels: of the newest task alone, 0 or 1, [batch, class], or with `single` the number of the class among them,
        [batch]. ValueError where no task was begun.
        """
        newest = int(self.newest)
        if newest < 0:
            raise ValueError("MultiLane: no task was begun; call begin(0) ahead of the first")
        if (pixel_values is None) == (stream is None):
            raise ValueError("MultiLane: takes pixel_values or stream, one of both")
        tasks = slice(newest if self.training else 0, newest + 1)
        last = self._lanes(self.stream(cast(Tensor, pixel_values)) if stream is None else stream, tasks)
        scores = self.head(F.normalize(last, dim=-1))  # [task, batch, class]
        numbers = range(tasks.start, tasks.stop)
        logits = torch.cat([score[:, self.classes(task)] for task, score in zip(numbers, scores, strict=True)], 1)
        loss = None if labels is None else self._loss(logits[:, logits.shape[1] - self.config.tasks[newest] :], labels)
        return ImageClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]  # torch's tensors

    @torch.no_grad()
    def stream(self, pixel_values: Tensor) -> Tensor:
        """What each frozen layer is given. [layer, batch, token, dim]"""
        states = [cast(Any, self.backbone.embeddings)(pixel_values)]
        for layer in cast(Any, self.backbone.layers)[:-1]:
            states.append(layer(states[-1]))
        return torch.stack(states)

    def _lanes(self, stream: Tensor, tasks: slice) -> Tensor:
        """Class tokens of these tasks' pathways, after the last norm. [task, batch, dim]"""
        batch, count = stream.shape[1], tasks.stop - tasks.start
        first = cast(Any, self.backbone.embeddings).cls_token.detach()[None].expand(count, batch, -1, -1)
        lanes = torch.cat([first, self.selectors[tasks, None].expand(-1, batch, -1, -1)], 2)
        for i, (layer, lane) in enumerate(zip(cast(Any, self.backbone.layers), self.lanes, strict=True)):
            lanes = lane(layer, stream[i], lanes, self.prompts[i, :, tasks] if i < len(self.prompts) else None)
        return self.backbone.layernorm(lanes[:, :, 0])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of the newest task's logits; those of all other classes count as 0 where the target is 0, log 2 each."""
        if self.config.single:
            return F.cross_entropy(logits, labels)
        if labels.shape != logits.shape:
            raise ValueError(f"MultiLane: labels of the newest task are {list(logits.shape)}; got {list(labels.shape)}")
        every = self.head.out_features
        rest = (every - logits.shape[1]) * torch.tensor(2.0).log()
        return (F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(logits) + rest) / every


def operations(dim: int, tokens: int, selectors: int, prompts: int = 0, mlp: int | None = None) -> float:
    """Of one layer of one pathway, forward, a multiply-add counting two: to hold against `frozen_operations`.

    >>> from regard.models.multi_lane import frozen_operations, operations
    >>> round(operations(768, 197, 20, 20) / frozen_operations(768, 197), 2)
    0.11
    """
    own = 1 + selectors
    summary = 4 * selectors * tokens * dim
    return summary + 4 * own * (own + prompts) * dim + _linear(own, dim, mlp)


def frozen_operations(dim: int, tokens: int, mlp: int | None = None) -> float:
    """Of one layer of the backbone."""
    return 4 * tokens**2 * dim + _linear(tokens, dim, mlp)


def _linear(tokens: int, dim: int, mlp: int | None) -> float:
    return 2 * tokens * (4 * dim**2 + 2 * dim * (mlp or 4 * dim))


def multi_lane(backbone: nn.Module, *, tasks: tuple[int, ...], **sizes: Any) -> MultiLane:
    """A `MultiLane` on a copy of this backbone, frozen, with tasks of so many classes; none is begun yet.

    backbone: transformers' ViTModel or ViTForImageClassification, whose blocks norm ahead of attention; TypeError else.
    """
    vit = backbone.vit if isinstance(backbone, ViTForImageClassification) else backbone
    if not isinstance(vit, ViTModel):
        raise TypeError(
            f"multi_lane: takes a ViTModel or ViTForImageClassification of transformers, whose blocks are pre-norm; "
            f"got {type(backbone).__name__}"
        )
    model = MultiLane(MultiLaneConfig(vit.config, tasks, **sizes))
    state = {name: value for name, value in vit.state_dict().items() if not name.startswith("pooler.")}
    model.backbone.load_state_dict(state)
    return model
