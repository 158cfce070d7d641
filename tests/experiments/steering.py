"""Can one vector change what a text is about?

The mean difference between texts on music and texts on food, at the last token of one layer, is added there to texts
on neither. Their embeddings then turn to music, or to food where it is subtracted; a random vector of the same length
turns them neither way. The number is the mean cosine with the texts on music, less that with those on food.
"""

import torch
from lab import bars

from qwen3core import Embedder, capture, edit
from qwen3core.edits import add

embedder = Embedder.from_pretrained("tiny-embedding", dtype="float32")
music = ["the violin", "a piano concert", "an opera singer", "the guitar", "a symphony", "jazz music"]
food = ["the bread", "a cheese dinner", "an apple pie", "the soup", "a sandwich", "cooked meat"]
texts = ["my neighbour came to see me", "the letter arrived on Monday", "they spoke about it all night"]
with capture(embedder, "layers.1.resid_post") as acts:
    vectors = embedder.encode(music + food)
last_tokens = acts.at("layers.1.resid_post", text=None).detach()
steer = last_tokens[:6].mean(0) - last_tokens[6:].mean(0)
random, music_not_food = torch.randn(256, generator=torch.manual_seed(0)) * steer.norm() / 256**0.5, {}
for name, vector in {"none": 0 * steer, "music": steer, "food": -steer, "random": random}.items():
    with edit(embedder, {"layers.1.resid_post": add(vector)}):
        similarity = embedder.similarity(embedder.encode(texts), vectors)
    music_not_food[name] = float(similarity[:, :6].mean() - similarity[:, 6:].mean())
bars(music_not_food, "Cosine with music less cosine with food, by what is added")
assert music_not_food["food"] < -0.3 < 0.3 < music_not_food["music"]
assert abs(music_not_food["random"] - music_not_food["none"]) < 0.2
