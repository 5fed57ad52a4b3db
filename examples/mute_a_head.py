"""Mute one head at a time, and see what each is worth on a text that repeats itself."""

import torch

import regard


class Mute:
    """Set the output of one head of one layer to zero."""

    def __init__(self, layer: int, head: int) -> None:
        self.layer, self.head = layer, head

    def output(self, call: regard.Call, output: torch.Tensor) -> torch.Tensor:
        muted = torch.arange(output.shape[1]) == self.head
        return output.masked_fill(muted[:, None, None], 0) if call.site.layer == self.layer else output


torch.manual_seed(0)
model, tokenizer = regard.load("reader")
tokens = torch.randint(100, 2000, (1, 20))
ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), tokens, tokens], dim=1)


@torch.no_grad()
def loss() -> float:
    """Mean loss on the second copy, where looking back helps."""
    return float(torch.nn.functional.cross_entropy(model(ids).logits[0, 20:-1], ids[0, 21:]))


whole, cost = loss(), {}
for layer in range(model.config.num_hidden_layers):
    for head in range(model.config.num_attention_heads):
        with regard.intervene(model, Mute(layer, head)):
            cost[layer, head] = loss() - whole
print(f"loss on the second copy, nothing muted: {whole:.2f}")
for (layer, head), more in sorted(cost.items(), key=lambda item: -item[1])[:5]:
    print(f"  without layer {layer} head {head}: {more:+.2f}")
