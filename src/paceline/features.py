"""What Paceline does that is no registered method, and which published systems it serves.

The numbers are those of the project's catalogue of published systems. `coverage` joins them with
the numbers that registered methods state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from paceline.registry import FAMILIES


@dataclass(frozen=True)
class Feature:
    """One thing that Paceline does without a name that users select.

    Attributes:
        name: short, unique.
        summary: one sentence.
        module: the file that holds it, from the root of the repository.
        catalogue: numbers of the systems in the catalogue that it serves.
        missing: for each of those numbers served in part only, what is missing.
    """

    name: str
    summary: str
    module: str
    catalogue: tuple[int, ...] = ()
    missing: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """One statement that a catalogued system is served.

    Attributes:
        number: of the system.
        by: the method, as `family name`, or the feature, as `feature name`.
        missing: what is missing; empty where the system is served whole.
    """

    number: int
    by: str
    missing: str = ""

    @property
    def served(self) -> str:
        """`whole` or `part`."""
        return "part" if self.missing else "whole"


# Systems that several methods serve together, and how they divide it.
SHARED = {
    393: "recover trains what structures left, perp what a pruner left, whose zeros stay",
    111: "stop rules hold its fallback, parallel drafting goes on drafting beside the disk",
    253: "narrow removes structures in the order of their costs, ziplm searches sizes by times",
    30: "letters holds the filters on spelling, sounds those on pronunciation",
    418: "exponential and inverse are the paper's two schemes",
}

# Systems that Paceline is to serve and does not yet.
NOT_YET = (
    21,
    41,
    48,
    56,
    102,
    103,
    115,
    120,
    129,
    133,
    183,
    190,
    217,
    228,
    231,
    238,
    249,
    257,
    269,
    274,
    290,
    293,
    332,
    420,
    428,
    433,
    448,
    452,
    464,
    480,
    482,
)

# Why some of them are not, where something is in the way.
WHY_NOT = {
    21: "a layer drops tokens by the attention of a prompt's last token, so that a prompt would be "
    "one pass over ever fewer tokens; passes run all their nodes through all layers",
    48: "prompt tokens in the verified tree need rows of embeddings beyond the vocabulary there; "
    "`lookahead_embeddings` runs such inputs in a pass of its own",
    115: "mask tokens in the verified tree, as of 48, and trained keys and values before the text",
    249: "measured in `benchmarks/lookup.py`: grouped kernels with activations of 8 bits, as its "
    "tables have, are faster at every width",
    464: "editing the rows that a probe points at was no better than editing random rows here",
    480: "pseudo states enter the tree between two layers, and a pass takes tokens only",
}

FEATURES = (
    # One model, one pass
    Feature(
        "token-tree verification",
        "Verify a tree of drafted tokens in one pass; each node attends to its own ancestors.",
        "native/engine/pass_attention.cpp",
    ),
    Feature(
        "batch-invariant kernels",
        "Reduce every output element in one order, whatever the batch, the tree or the threads.",
        "native/kernels/matmul.hpp",
    ),
    Feature(
        "packed passes",
        "Run prompts and trees of many requests in one pass as one run of rows, without padding.",
        "native/engine/pass.cpp",
        (298, 371),
        {371: "encoder models; the fused attention kernels for GPUs"},
    ),
    Feature(
        "shared-prefix attention",
        "Read cached pages that several requests of a pass share once for all of them, exactly.",
        "native/engine/pass_attention.cpp",
        (279,),
    ),
    Feature(
        "weight-only formats",
        "Multiply int8, int4 and ternary weights by activations, with grouped scales, on the CPU; "
        "`paceline compress --target-loss` finds the smallest recipe that loses no more.",
        "src/paceline/engines/formats.py",
        (267,),
    ),
    Feature(
        "named recipes",
        "Compress by a recipe that comes with Paceline: `mobilenmt` stores weights, embedding and "
        "head as bytes and rounds activations within fixed ranges.",
        "src/paceline/compress/recipes/mobilenmt.toml",
        (161,),
        {161: "training a small model by the paper's principles; the engine for ARM"},
    ),
    Feature(
        "lossless packing",
        "Store floating-point weights bit for bit in two thirds of bfloat16: exponents are entropy-"
        "coded, chunks decode in parallel when they are loaded (`paceline convert --lossless`).",
        "src/paceline/models/tensors/packed_floats.py",
        (109,),
    ),
    Feature(
        "weights from disk",
        "Read layers that do not fit into memory from disk while a pass computes those before, "
        "once for a whole batch and all nodes of its trees (`--weights-memory`).",
        "native/engine/weight_stream.cpp",
        (96,),
        {96: "keys, values and activations on disk; the cache in 4 bits"},
    ),
    Feature(
        "windows of neurons",
        "Keep the neurons of recent tokens in memory and read others from a file, in layers where "
        "ReLU makes most of them 0 (`--engine reference --weights-memory`); a bound finds those "
        "that count.",
        "src/paceline/engines/neuron_window.py",
        (14,),
        {14: "it runs in the reference engine, and leaves layers with a gate alone"},
    ),
    Feature(
        "attention on other workers",
        "Leave attention to processes that hold keys and values, while groups of requests take "
        "turns at the matrices: an experiment (`benchmarks/attention_workers.py`).",
        "benchmarks/attention_workers.py",
        (239,),
        {239: "it is an experiment, which runs given tokens; no server leaves attention to others"},
    ),
    Feature(
        "bitmaps of sparse weights",
        "Store pruned matrices as a bitmap and the packed weights that are not zero, and expand "
        "them when they are loaded (`paceline convert --lossless`), or on the device each time "
        "that their layer runs (`--format stored`).",
        "src/paceline/engines/stored_layers.py",
        (128,),
    ),
    Feature(
        "stories in long contexts",
        "Ask for one, two or three facts of a story that book text hides (`paceline eval --suite "
        "babilong`).",
        "src/paceline/measuring/evaluation/story_tasks.py",
        (204,),
        {204: "the model: memory that is trained to go from segment to segment"},
    ),
    Feature(
        "compressed caches",
        "Keep keys and values in fp16 or int8; a pass reads them as they are.",
        "native/engine/kv_cache.cpp",
    ),
    Feature(
        "caches with corrected errors",
        "Round keys and values to few bits, keep outliers, and add a low rank of the errors, in "
        "the reference engine (`--kv-format gear:bits=3,rank=2`).",
        "src/paceline/engines/grouped_rounding.py",
        (417,),
        {417: "the native engine: memory that is saved, and times"},
    ),
    Feature(
        "dual chunk attention",
        "Turn queries and keys by positions within chunks, so that no distance exceeds a trained "
        "one and texts may outgrow the trained context (`--rope dual_chunk:factor=4`).",
        "src/paceline/models/dual_chunk.py",
        (25,),
        {25: "sparse attention refined by its recall; pipelined prompts; the native engine"},
    ),
    # Speculation
    Feature(
        "exact walk",
        "Draw one token at each visited node with noise keyed by seed and position, so that no "
        "drafter changes the output.",
        "src/paceline/decoding/walk.py",
    ),
    Feature(
        "rejection walk",
        "Accept drafted tokens by the classical rejection rule, which keeps the distribution.",
        "src/paceline/decoding/rejection.py",
    ),
    Feature(
        "governor",
        "Size each tree by the measured cost of a pass, down to plain decoding.",
        "src/paceline/decoding/governor.py",
    ),
    Feature(
        "calibration of draft probabilities",
        "Scale a draft model's logits by a temperature that learns from accepted tokens.",
        "src/paceline/drafters/draft_model/calibration.py",
    ),
    Feature(
        "stop rules of draft models",
        "Stop drafting by calibrated probabilities, by a threshold that follows what was accepted, "
        "or by a bandit (`stop=` of model drafters).",
        "src/paceline/drafters/draft_model/stop_rules.py",
        (442, 134, 111),
        {
            442: "the trained acceptance head; calibrated probabilities stand in for it",
            134: "a decoder layer as early-exit head; `head` with `exit_adapter` has an MLP there",
        },
    ),
    Feature(
        "nested draft models",
        "Ask the next larger draft where the smaller one is unsure (`model:path=A|B`).",
        "src/paceline/drafters/model.py",
        (255,),
        {255: "one sorted checkpoint whose sub-models share weights, and its training"},
    ),
    Feature(
        "draft head over frequent tokens",
        "Compute a draft's logits for the N most frequent tokens only (`model:head=N`).",
        "src/paceline/drafters/draft_model/frequent_tokens.py",
        (224,),
    ),
    Feature(
        "parallel drafting",
        "Let the draft go on while the target verifies, or streams from disk "
        "(`model:schedule=pearl`).",
        "src/paceline/drafters/draft_model/parallel.py",
        (52, 111),
    ),
    Feature(
        "drafts with another tokenizer",
        "Draft with a model of other tokens by way of the text.",
        "src/paceline/drafters/draft_model/cross_tokenizer.py",
    ),
    Feature(
        "warm start",
        "Start learning drafters from text that the model wrote to itself (`paceline warm`).",
        "src/paceline/drafters/history/warm_start.py",
    ),
    # Serving
    Feature(
        "scheduler",
        "Batch continuously, fairly between clients, with preemption and deadlines.",
        "src/paceline/serving/scheduler.py",
    ),
    Feature(
        "chunked prefill",
        "Give each pass a budget: all running requests first, then parts of prompts, sized by the "
        "measured time of a pass (`--prefill-slowdown`).",
        "src/paceline/serving/pass_budget.py",
        (471, 148, 353),
        {353: "chunks of equal size for pipelines of several devices"},
    ),
    Feature(
        "prefix cache",
        "Keep the keys and values of finished requests in a radix tree, and start from them.",
        "src/paceline/serving/prefix_cache.py",
    ),
    Feature(
        "prefix cache on disk",
        "Keep the keys and values of prompts in a folder, so that a restart need not compute them "
        "again (`--prefix-cache-dir`).",
        "src/paceline/engines/page_store.py",
    ),
    Feature(
        "chunk cache",
        "Compute each document of a prompt once, apart from the others, keep its keys and values "
        "in memory and on disk, and move them to where it stands (`documents`, `--chunk-cache`).",
        "src/paceline/documents/assembly.py",
        (291,),
        {291: "fine-tuning the model on independent chunks"},
    ),
    Feature(
        "recomputed tokens of documents",
        "Compute those tokens of a stored document again that attend most to what stands before it "
        "(`recompute`).",
        "src/paceline/documents/dependence.py",
        (369,),
        {369: "preloading of chunks while requests wait"},
    ),
    Feature(
        "prompt filter",
        "Let the first layers choose the tokens of a long prompt that the whole model reads, as a "
        "shorter prompt that can be read (`LM.filter_prompt`, `generate --prompt-keep`).",
        "src/paceline/prompt_filter.py",
        (346,),
    ),
    Feature(
        "memory limit",
        "Hold a process's memory to a limit; drafts yield first, then cached prefixes.",
        "src/paceline/serving/kv_budget.py",
    ),
    Feature(
        "replicas",
        "Serve from several engines on a Ray cluster; a node that fails loses no request.",
        "src/paceline/serving/cluster/router.py",
    ),
    Feature(
        "prefill replicas",
        "Let other processes read long prompts and hand over their pages of keys and values, bit "
        "for bit, so that running streams do not wait (`--prefill-replicas`).",
        "src/paceline/serving/prefill/apart.py",
        (100,),
        {100: "pools that change roles with the load, and provisioning of hardware for each"},
    ),
    # Preparing and measuring
    Feature(
        "pipeline",
        "Divide the layers of a model among machines; a lost one's cache is computed again.",
        "src/paceline/engines/pipeline/engine.py",
        (158,),
        {158: "its nodes serve one process: no swarm of strangers, and hidden states stay float32"},
    ),
    Feature(
        "search for sampling settings",
        "Find temperature, top-p, number and length of answers within a budget of tokens "
        "(`paceline tune-sampling`).",
        "src/paceline/planning/sampling_search.py",
        (275,),
        {275: "proposals by BlendSearch; half are drawn at random and half near the best"},
    ),
    Feature(
        "planner",
        "Find the fastest exact setup of a model for this machine, or the smallest that loses no "
        "more than is allowed (`paceline plan`); measured, predicted, and verified in turns.",
        "src/paceline/planning/planner.py",
    ),
    Feature(
        "proof",
        "Compare every output with plain decoding, token by token, and tell ties from bugs.",
        "src/paceline/measuring/proof.py",
    ),
    Feature(
        "benchmark of grammars",
        "Measure coverage, validity and mask times on the schemas of JSONSchemaBench.",
        "benchmarks/grammars.py",
        (491,),
        {491: "the official JSON Schema test suite"},
    ),
)


def claims() -> list[Claim]:
    """Return every claim of every method and feature, hidden methods apart."""
    found = [
        Claim(number, f"feature {each.name}", each.missing.get(number, ""))
        for each in FEATURES
        for number in each.catalogue
    ]
    for family, registry in FAMILIES.items():
        for name, method in registry.visible().items():
            found += [
                Claim(number, f"{family} {name}", method.missing.get(number, ""))
                for number in method.catalogue
            ]
    return found


def coverage() -> dict[int, list[Claim]]:
    """Return the claims by number of the system; a number that is missing is not served."""
    found: dict[int, list[Claim]] = {}
    for claim in claims():
        found.setdefault(claim.number, []).append(claim)
    return dict(sorted(found.items()))
