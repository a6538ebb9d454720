"""Models whose truth is known by construction: a variable is written into a rotated subspace at a known site.

A correct search finds this subspace at this site. There are two models:

    planted_regression   a plain module that reads a variable from a subspace of an isometric copy of its input
    planted_decoder      a stock Llama that forms a variable at one layer and position and reads it in the next layer

Nothing is trained: all weights follow from the seed.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from subspace_lab.core.alignments import Alignment
from subspace_lab.core.arguments import whole_number
from subspace_lab.core.orthonormal import random_orthonormal
from subspace_lab.core.sites import Site
from subspace_lab.core.subspaces import FixedSubspace
from subspace_lab.das.causal_models import CausalModel
from subspace_lab.das.pairs import Counterfactuals, Pairs
from subspace_lab.model.batches import Batch

VARIABLE = "planted"


@dataclass(frozen=True, eq=False)
class Planted:
    """A model, pairs that exchange the planted variable, and the truth about this variable.

    Attributes:
        model: the model, in evaluation mode.
        pairs: in three splits.
        truth: {"planted": (site, subspace)}, the result of a correct search.
    """

    model: nn.Module
    pairs: Pairs
    truth: Alignment

    @property
    def site(self) -> Site:
        return self.truth.site(VARIABLE)

    @property
    def basis(self) -> Float[Tensor, "rank width"]:
        """R₀, an orthonormal basis of the subspace."""
        return self.truth.subspace(VARIABLE).basis()


# --- isometric regression -----------------------------------------------------------------------------------


class PlantedRegression(nn.Module):
    """y = (V R₀ h + 1) / C with h = Qᵀ x: an orthogonal copy of the input, from which k dimensions are read.

    Q is a random orthogonal matrix, and R₀ are its first k rows. V contains the C = k + 1 corners of a regular
    simplex in R^k. If R₀ h is a corner, y is 1 for this corner and 0 for the others. The map from R₀ h to y is a
    multiple of an isometry, so all directions of the subspace have the same effect.
    """

    def __init__(self, width: int, rank: int, seed: int) -> None:
        super().__init__()
        rotation, corners = random_orthonormal(width, width, seed), simplex(rank)
        values = len(corners)
        self.embed = nn.Linear(width, width, bias=False)
        self.readout = nn.Linear(width, values)
        with torch.no_grad():
            self.embed.weight.copy_(rotation.T)
            self.readout.weight.copy_(corners @ rotation[:rank] / values)
            self.readout.bias.fill_(1 / values)

    def forward(self, inputs: Float[Tensor, "batch width"]) -> Float[Tensor, "batch value"]:
        return self.readout(self.embed(inputs))


def simplex(rank: int) -> Float[Tensor, "value rank"]:
    """The rank + 1 corners of a regular simplex in R^rank: their mean is 0 and their covariance the identity."""
    centred = torch.eye(rank + 1, dtype=torch.float64) - 1 / (rank + 1)
    basis = torch.linalg.svd(centred).Vh[:rank]
    return (math.sqrt(rank + 1) * centred @ basis.T).float()


def squared_error(logits: Float[Tensor, "pair value"], answer: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
    """|y − e_v|², the regression's loss: 0 for all pairs if the subspace is R₀, and for no other one of its rank."""
    return (logits - nn.functional.one_hot(answer, logits.shape[-1])).square().sum(-1)


def planted_regression(
    seed: int = 0,
    *,
    width: int = 32,
    rank: int = 4,
    copy: float = 0.0,
    batch: int = 256,
    dev: int = 256,
    test: int = 512,
) -> Planted:
    """A `PlantedRegression` whose variable has one of rank + 1 values; the other dimensions are noise from N(0, 1).

    All directions of the stream have variance 1, so variance gives no information. The variable uses k of them. Of all
    subspaces of rank k only R₀ gives the expected output, because any other subspace also brings noise from the source.

    With `copy` = s above 0, k of the other dimensions are s · z + N(0, 1), where z is the variable: a copy that the
    model does not read. A direction that is turned from the variable's direction by arctan s towards the copy also
    exchanges the variable, apart from the noise. With a strong copy a search ends at such directions and has the wrong
    span; with a copy as strong as the variable it finds the variable (the construction follows Makelov et al. 2023,
    arXiv 2311.17030).

    Args:
        seed: seed of the rotation and of the pairs.
        width, rank: d and k.
        copy: s, the strength of the copy; 0 means no copy.
        batch: fresh training pairs in each step.
        dev, test: numbers of held-out pairs.

    Raises:
        ValueError: a rank that leaves no dimension for the noise, or too few for the copy.
    """
    width, rank = whole_number(width, "width"), whole_number(rank, "rank")
    if not 1 <= rank < width:
        raise ValueError(f"rank={rank} in a width of {width}: possible are 1 to {width - 1}.")
    if copy and 2 * rank > width:
        raise ValueError(f"rank={rank} with a copy, width={width}: possible are 1 to {width // 2}.")
    model = PlantedRegression(width, rank, seed).eval().requires_grad_(False)
    corners = simplex(rank)

    def draw(n: int, generator: torch.Generator) -> tuple[Batch, Tensor]:
        value = torch.randint(rank + 1, (n,), generator=generator)
        noise = torch.randn(n, width - rank, generator=generator)
        if copy:
            noise[:, :rank] += copy * corners[value]
        return Batch.of(torch.cat([corners[value], noise], 1)), value

    def counterfactuals(n: int, which: int) -> Counterfactuals:
        generator = _generator(seed, which)
        (base, before), (source, after) = draw(n, generator), draw(n, generator)
        answers = tuple(str(value) for value in range(rank + 1))
        return Counterfactuals(base, {VARIABLE: source}, before, after, answers, values={VARIABLE: after})

    truth = FixedSubspace(random_orthonormal(width, width, seed)[:rank])
    return Planted(
        model,
        Pairs(
            lambda step: counterfactuals(batch, step),
            counterfactuals(dev, -1),
            counterfactuals(test, -2),
            "planted",
        ),
        Alignment({VARIABLE: (Site("embed.output"), truth)}),
    )


# --- a decoder ----------------------------------------------------------------------------------------------

WIDTH, HEADS, HEAD_WIDTH, HIDDEN = 64, 4, 16, 64
LAYERS, LENGTH, VALUES, FILLERS = 4, 7, 3, 12
SHARP = 10.0  # its square times a flag's square is an attention score: all other positions get no attention
READ, WRITTEN = (
    0.15,
    0.02,
)  # standard deviations of the random weights, so that they write as much as the planted weights

# Tokens: one begins each text, and one marks the position where the variable is formed. The first number, the second
# number, the question and the answer are each one of `VALUES` tokens. All other tokens are fillers.
BEGIN, MARKER = 0, 1
FIRST, SECOND, ASK, ANSWER = (2 + i * VALUES for i in range(4))
FILLER = 2 + 4 * VALUES
VOCABULARY = FILLER + FILLERS

# Before the rotation each of these has its own axes. A number is a point on the unit circle, so it has two axes.
FLAGS = ("always", "begin", "marker", "first", "second", "ask")
PLANES = ("number", "moved first", "moved second", VARIABLE, "moved planted", "answer")
AXES = {name: [i] for i, name in enumerate(FLAGS)}
AXES |= {name: [len(FLAGS) + 2 * i, len(FLAGS) + 2 * i + 1] for i, name in enumerate(PLANES)}
BEHIND = slice(len(FLAGS) + 2 * len(PLANES), WIDTH)  # the dimensions that the random weights read and write

PLANTED_MODEL = CausalModel(
    {
        VARIABLE: lambda first, second: (first + second) % VALUES,
        "answer": lambda planted, ask: (planted + ask) % VALUES,
    }
)


def planted_decoder(seed: int = 0, *, train: int = 256, dev: int = 128, test: int = 256) -> Planted:
    """A Llama of four layers that adds three numbers modulo 3; the sum of the first two is the planted variable.

    In layer L two heads at position p, which has the marker, attend to the two numbers. The gated MLP multiplies them
    as complex numbers e^{2πi v / 3}, which adds the values v, and writes the product into a plane. Before layer L
    nothing at p depends on either number. In layer L + 1 the last position reads the plane and adds the third number
    in the same way. So after it no site has the variable alone: the last position holds the answer. The other heads
    and hidden units are random; they read and write the remaining dimensions and change the length of the states.
    Finally all weights are rotated by an orthogonal matrix, which an RMS norm without weights does not notice.

    L, p, the positions of the numbers, the rotation and the random weights are drawn from the seed.

    Args:
        seed: seed of the model and of the pairs.
        train, dev, test: numbers of pairs.
    """
    generator = torch.Generator().manual_seed(whole_number(seed, "seed"))
    layer = int(torch.randint(1, LAYERS - 1, (), generator=generator))
    first, second, place = (torch.randperm(LENGTH - 2, generator=generator)[:3] + 1).sort().values.tolist()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4 * LENGTH,
        bos_token_id=BEGIN,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    rotation = random_orthonormal(WIDTH, WIDTH, generator).double()
    weights = _weights(layer, generator)
    writers = ("o_proj.weight", "down_proj.weight")
    rotated = {n: rotation.T @ w if n.endswith(writers) else w @ rotation for n, w in weights.items()}
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.load_state_dict({name: w.float() for name, w in rotated.items()}, strict=False)

    def counterfactuals(n: int, which: int) -> Counterfactuals:
        drawn = _generator(seed, which)
        texts, numbers = zip(*(_texts(n, (first, second, place), drawn) for _ in range(2)), strict=True)
        base, source = numbers
        return Counterfactuals(
            base=_batch(texts[0]),
            sources={VARIABLE: _batch(texts[1])},
            base_answer=PLANTED_MODEL.run(base)["answer"],
            answer=PLANTED_MODEL.interchange(base, {VARIABLE: source})["answer"],
            answers=tuple(str(value) for value in range(VALUES)),
            tokens=ANSWER + torch.arange(VALUES),
            values={VARIABLE: PLANTED_MODEL.run(source)[VARIABLE]},
        )

    return Planted(
        model,
        Pairs(counterfactuals(train, 0), counterfactuals(dev, 1), counterfactuals(test, 2), "planted sum"),
        Alignment(
            {VARIABLE: (Site("block_output", layer, place), FixedSubspace(rotation[AXES[VARIABLE]].float()))}
        ),
    )


def _texts(
    n: int, places: tuple[int, int, int], generator: torch.Generator
) -> tuple[Int[Tensor, "n length"], dict[str, Tensor]]:
    """Random texts, and the numbers in them."""
    ids = FILLER + torch.randint(FILLERS, (n, LENGTH), generator=generator)
    first, second, ask = torch.randint(VALUES, (3, n), generator=generator)
    ids[:, 0], ids[:, places[2]] = BEGIN, MARKER
    ids[:, places[0]], ids[:, places[1]], ids[:, -1] = FIRST + first, SECOND + second, ASK + ask
    return ids, {"first": first, "second": second, "ask": ask}


def _batch(ids: Tensor) -> Batch:
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _weights(layer: int, generator: torch.Generator) -> dict[str, Tensor]:
    """All matrices before the rotation, under the names of a Llama's state."""

    def random_weights(outputs: int, scale: float = READ) -> Tensor:
        """(outputs, WIDTH) random weights that read only the dimensions after the planted ones."""
        found = torch.zeros(outputs, WIDTH, dtype=torch.float64)
        found[:, BEHIND] = torch.randn(outputs, WIDTH, generator=generator)[:, BEHIND].double() * scale
        return found

    embedding = random_weights(VOCABULARY, 0.25)
    head = random_weights(VOCABULARY, 0.02)
    embedding[:, AXES["always"]] = 1
    for flag, start, count in (
        ("begin", BEGIN, 1),
        ("marker", MARKER, 1),
        ("first", FIRST, VALUES),
        ("second", SECOND, VALUES),
        ("ask", ASK, VALUES),
    ):
        embedding[start : start + count, AXES[flag]] = 1
        if count == VALUES:
            embedding[start : start + count, AXES["number"]] = _circle()
    head[ANSWER : ANSWER + VALUES, AXES["answer"]] = 4 * _circle()
    found = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    for i in range(LAYERS):
        q, k, v = (random_weights(HEADS * HEAD_WIDTH) for _ in range(3))
        o, down = random_weights(HEADS * HEAD_WIDTH, WRITTEN).T, random_weights(HIDDEN, WRITTEN).T
        gate, up = random_weights(HIDDEN), random_weights(HIDDEN)
        if i == layer:
            _look(0, "marker", "first", "number", "moved first", (q, k, v, o))
            _look(1, "marker", "second", "number", "moved second", (q, k, v, o))
            _add("moved first", "moved second", VARIABLE, (gate, up, down))
        if i == layer + 1:
            _look(0, "ask", "marker", VARIABLE, "moved planted", (q, k, v, o))
            _add("moved planted", "number", "answer", (gate, up, down))
        attention = dict(zip("qkvo", (q, k, v, o), strict=True))
        found |= {f"model.layers.{i}.self_attn.{n}_proj.weight": w for n, w in attention.items()}
        mlp = {"gate": gate, "up": up, "down": down}
        found |= {f"model.layers.{i}.mlp.{n}_proj.weight": w for n, w in mlp.items()}
    return found


def _look(head: int, who: str, whom: str, what: str, to: str, weights: tuple[Tensor, ...]) -> None:
    """Make a head copy the plane `what` from the token `whom` to the plane `to` of the token `who`.

    Other tokens than `who` attend to the first token of the text, which has nothing in this plane. The scores use the
    head's last dimensions, whose rotary angles are less than .01 over a text.
    """
    q, k, v, o = weights
    rows = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
    for w in (q, k, v):
        w[rows] = 0
    o[:, rows] = 0
    home, there = rows.start + HEAD_WIDTH // 2 - 1, rows.start + HEAD_WIDTH // 2 - 2
    q[home, AXES["always"]] = k[home, AXES["begin"]] = SHARP
    q[there, AXES[who]] = 2 * SHARP
    k[there, AXES[whom]] = SHARP
    for i, (source, target) in enumerate(zip(AXES[what], AXES[to], strict=True)):
        v[rows.start + i, source] = 1
        o[target, rows.start + i] = 0.4  # compensates for the norm before the head, which scales up its input


def _add(one: str, other: str, to: str, weights: tuple[Tensor, ...]) -> None:
    """Make hidden units write the complex product of two planes, whose angle is the sum of their angles.

    A product of two real numbers needs two gated units, because silu(x) − silu(−x) = x: silu(x) y − silu(−x) y = x y.
    """
    gate, up, down = weights
    re, im = AXES[to]
    (a, b), (c, d) = AXES[one], AXES[other]
    terms = [(a, c, re, 1), (b, d, re, -1), (a, d, im, 1), (b, c, im, 1)]
    units = 0
    for x, y, target, sign in terms:
        for half in (1, -1):
            gate[units], up[units], down[:, units] = 0, 0, 0
            gate[units, x], up[units, y], down[target, units] = half, 1, 0.15 * sign * half
            units += 1


def _circle() -> Float[Tensor, "value 2"]:
    """The numbers as points on the unit circle."""
    angles = torch.arange(VALUES, dtype=torch.float64) * (2 * math.pi / VALUES)
    return torch.stack([angles.cos(), angles.sin()], 1)


# --- helpers of both ----------------------------------------------------------------------------------------


def _generator(seed: int, which: int) -> torch.Generator:
    """A generator for one set of pairs; the seed is hashed, so that no two sets share their random numbers."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{which}".encode()))
