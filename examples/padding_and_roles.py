"""A padded batch, and the roles of a chat: what each position is, and how to leave positions out."""

import torch

import regard

model, tokenizer = regard.load("reader")

# Two texts of unequal length. Padding is labelled; what stands in its rows is not to be read.
inputs = tokenizer(["To be, or not to be.", "Yes."], padding=True, return_tensors="pt")
with torch.no_grad(), regard.record(model, "entropy", processor=tokenizer) as recording:
    model(**inputs)
node = recording.tree["language_model"].to_dataset()
real = node["entropy"].where(node["query_role"] != "pad")
for sample in range(node.sizes["batch"]):
    roles = node["query_role"].isel(batch=sample).values
    mean = float(real.isel(batch=sample).mean())
    print(f"text {sample}: {list(roles).count('pad')} of {len(roles)} positions are padding; mean entropy {mean:.2f}")

# A chat. The reader has no template of its own, so this one is made up.
tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
messages = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Is the old man at home?"},
]
roles = regard.chat_roles(tokenizer, messages)
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
with torch.no_grad(), regard.record(model, "mass", processor=tokenizer, roles=roles) as recording:
    model(**inputs)
mass = recording.tree["language_model"]["mass"]
for role in mass["role"].values:
    print(f"the last token gives {float(mass.sel(role=role).isel(query=-1).mean()):.0%} to {role}")
