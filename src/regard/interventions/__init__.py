"""Interventions: changes of a call, of a hidden state or of the next-token logits.

Each file holds one method, a class of the same name as the file, with keyword-only knobs at the paper's default:

- one that changes a model while it runs is made by its knobs, and goes to `regard.intervene(model, var(...))`;
- one for models that paint may also have `on_step_end`, which goes to a pipeline of diffusers as
  `callback_on_step_end`; its `fit` is given what the pipeline is called with;
- one that changes the next-token logits is made by model, inputs and knobs, and goes to
  `model.generate(**inputs, logits_processor=[avisc(model, inputs, ...)])`;
- one that shows the model another picture is made by `fit`, and goes to `regard.intervene`.

What has to be found out on a model is found by a plain function of the same file, and is a knob. A method that needs
it says so in `fit`, by which `regard steer` makes every method: `vhr.fit(model, inputs)` is
`vhr(heads=aware_heads(model, inputs))`. `off` holds the knobs with which a method changes nothing, for the tests that
every method passes.
"""

from ._by_hand import scale_attention, scale_heads
from ._method import Method
from ._painting import after_steps, painted

__all__ = ["Method", "after_steps", "painted", "scale_attention", "scale_heads"]
