"""What does not go together, as one table that code, documentation and tests read.

Whoever makes a request, a job or an engine states the sides that it has, each with the name of what
has it, and calls `check`. A method's needs are abilities of an engine; `check_needs` compares them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from paceline.abilities import Ability
from paceline.errors import CombinationError


class Side(StrEnum):
    """One side of a rule: a property of a request, of what drafts or searches, or of an engine."""

    KV_POLICY = "a KV policy"
    DOCUMENTS = "documents"
    FILTERED_PROMPT = "a filtered prompt"
    POSITION_DRAFTER = "a drafter that attends to chosen positions"
    GUIDE = "a guide"
    OTHER_GUIDE = "another guide with the same place in the order"
    ONE_TEXT_GUIDE = "a guide that follows one text"
    GROWING_TEXT_GUIDE = "a guide that follows a growing text"
    SEARCH = "a search strategy"
    DRAWLESS_SEARCH = "a strategy that draws nothing"
    DRAFTLESS_SEARCH = "a strategy that drafts nothing"
    REVISITING_SEARCH = "a strategy that goes back to texts that it left"
    SHARED_LOGITS_SEARCH = "a strategy with one row of logits for all drafts"
    TEMPERATURE = "a temperature above 0"
    GREEDY = "temperature 0"
    REJECTION = "the rejection walk"
    ADAPTIVE_BUDGET = "an automatic budget"
    PROBABILITY_FREE_DRAFTER = "a drafter without draft probabilities"
    NOISE_WATERMARK = "a watermark in the noise of the draws"
    DETERMINING_WATERMARK = "a watermark that nearly determines the text"
    CONTROLS = "controls or guides"
    ONE_TEXT_CONTROL = "a control that follows one text"
    PREDICTION = "a prediction of the output"
    PREDICTION_FREE_DRAFTER = "a drafter that reads no prediction"
    COMPARED_ANSWERS = "answers of which the best is taken"
    STREAM = "a stream"
    PROMPT_SCORES = "scores of a prompt"
    INFILL = "a suffix"
    SYSTEM_PROMPT = "a system prompt"
    RAW_PROMPT = "a prompt that is taken as it is"
    COMPARISON = "a comparison with plain decoding"
    LOSSY_DRAFTER = "a lossy drafter"
    TIMING = "a comparison of times with plain decoding"
    GRAMMAR = "a grammar or schema"
    RULES = "a grammar of several rules"
    TOOLS = "tools"
    NO_STOP_TOKEN = "a request without a stop token"
    STOP_STRINGS = "stop strings"
    END_CONTROL = "a control that decides when the text may end"
    DRAFT_OPTION = "an option of drafting"
    FREQUENT_HEAD = "a draft head over frequent tokens"
    PARALLEL_DRAFTING = "parallel drafting"
    SEVERAL_DRAFTS = "several nested drafts"
    OTHER_TOKENS = "a draft with another tokenizer"
    STORED_PREFIXES = "a prefix cache on disk"
    NATIVE = "the native engine"
    REFERENCE = "the reference engine"
    STATIC = "the static engine"
    DEVICE = "a device"
    THREADS = "a number of threads"
    KV_FORMAT = "a format of the cache"
    GROUPED_KV = "a cache in groups of positions"
    LOW_RANK_KV = "a cache with a low rank of its errors"
    LATENTS = "latents in place of keys and values"
    PATTERN = "an attention pattern"
    MASK_PATTERN = "an attention pattern that is a mask"
    EXITS = "an exit policy"
    DUAL_CHUNK = "dual chunk attention"
    STREAMED_WEIGHTS = "layers that stream from disk"
    PIPELINE = "layers on several nodes"
    PREFILL_APART = "prefill replicas"
    SEVERAL_MODELS = "several models as one"
    NESTED_MEMORY = "a memory that a nested checkpoint is cut to"


@dataclass(frozen=True)
class Rule:
    """Two sides that do not go together.

    Attributes:
        a, b: the sides.
        reason: why, as a clause.
        advice: what to do instead.
    """

    a: Side
    b: Side
    reason: str
    advice: str = "leave one of them out"

    @property
    def name(self) -> str:
        """Short and unique."""
        return f"{self.a.name}-{self.b.name}".lower().replace("_", "-")


S = Side
RULES = (
    Rule(
        S.KV_POLICY,
        S.POSITION_DRAFTER,
        "the policy drops the positions that the drafter chooses from",
    ),
    Rule(
        S.KV_POLICY,
        S.GUIDE,
        "the policy bounds the cache of the model alone, and a guide keeps texts of its own",
    ),
    Rule(
        S.KV_POLICY,
        S.PATTERN,
        "the pattern chooses among all positions, and the policy drops some",
    ),
    Rule(
        S.KV_POLICY,
        S.SEARCH,
        "a search forks and cuts texts, and rows that were dropped cannot be brought back",
    ),
    Rule(
        S.KV_POLICY,
        S.GROUPED_KV,
        "its positions are rounded in groups, and no single row can leave them",
        "take kv_format int8 or fp16, or leave the policy out",
    ),
    Rule(
        S.POSITION_DRAFTER,
        S.GROUPED_KV,
        "its positions are rounded in groups, and the drafter chooses single ones",
        "take kv_format int8 or fp16, or another drafter",
    ),
    Rule(
        S.PATTERN,
        S.GROUPED_KV,
        "the pattern chooses positions by keys that are not rounded",
        "leave kv_format or the pattern out",
    ),
    Rule(
        S.LATENTS,
        S.GROUPED_KV,
        "the layers cache one latent, which has no keys to round for each channel",
        "leave kv_format out",
    ),
    Rule(
        S.DOCUMENTS,
        S.KV_POLICY,
        "the policy bounds what it has seen growing, and documents come as a whole",
    ),
    Rule(
        S.DOCUMENTS,
        S.GROUPED_KV,
        "its positions are rounded in groups, and documents begin and end between them",
        "take kv_format int8 or fp16, or give the documents as part of the prompt",
    ),
    Rule(
        S.DOCUMENTS,
        S.GUIDE,
        "a guide reads the text itself, and documents are computed apart from it",
    ),
    Rule(
        S.DOCUMENTS,
        S.PATTERN,
        "the pattern chooses among positions, and documents are moved to theirs",
    ),
    Rule(
        S.DOCUMENTS,
        S.FILTERED_PROMPT,
        "documents are kept whole, and a filter chooses among the tokens of one prompt",
    ),
    Rule(
        S.TOOLS,
        S.FILTERED_PROMPT,
        "the template writes the tools into the prompt, and a filter leaves tokens out there",
    ),
    Rule(S.DOCUMENTS, S.EXITS, "prompts run all layers, and documents are read apart from them"),
    Rule(
        S.DOCUMENTS,
        S.SEARCH,
        "a search computes its prompt itself",
    ),
    Rule(
        S.DOCUMENTS,
        S.PROMPT_SCORES,
        "the scores are those of a text that was computed as a whole",
    ),
    Rule(
        S.DOCUMENTS,
        S.INFILL,
        "the prompt then stands between special tokens",
    ),
    Rule(
        S.TEMPERATURE, S.DRAWLESS_SEARCH, "the strategy draws nothing", "give temperature 0 or none"
    ),
    Rule(
        S.NOISE_WATERMARK,
        S.GREEDY,
        "the watermark replaces the noise of sampling, and greedy decoding has none",
        "take a temperature above 0, or the watermark green",
    ),
    Rule(
        S.NOISE_WATERMARK,
        S.REJECTION,
        "the watermark replaces the noise of the gumbel walk",
        "use --walk gumbel",
    ),
    Rule(S.NOISE_WATERMARK, S.DRAWLESS_SEARCH, "without draws there is nothing to mark"),
    Rule(
        S.ONE_TEXT_CONTROL,
        S.DRAWLESS_SEARCH,
        "the strategy follows several texts",
        "leave the control out",
    ),
    Rule(S.PREDICTION, S.DRAFTLESS_SEARCH, "only drafters read it", "leave the prediction out"),
    Rule(S.DRAFT_OPTION, S.DRAFTLESS_SEARCH, "the strategy has no drafter", "leave the option out"),
    Rule(S.REJECTION, S.SEARCH, "strategies know one walk", "use --walk gumbel"),
    Rule(S.COMPARISON, S.SEARCH, "its output is not that of plain decoding", "leave the check out"),
    Rule(
        S.STORED_PREFIXES,
        S.SEARCH,
        "a search computes its prompt itself",
        "leave out the folder",
    ),
    Rule(
        S.STORED_PREFIXES,
        S.KV_POLICY,
        "what is stored was computed with all positions, and the policy drops some",
    ),
    Rule(
        S.STORED_PREFIXES,
        S.PATTERN,
        "what is stored are keys and values, and not by what the pattern chooses among them",
    ),
    Rule(S.ONE_TEXT_GUIDE, S.SEARCH, "the strategy follows several texts", "leave the guide out"),
    Rule(
        S.GROWING_TEXT_GUIDE,
        S.REVISITING_SEARCH,
        "the guide stops for good where its text has grown far enough",
        "leave stop out, or take beam",
    ),
    Rule(
        S.CONTROLS,
        S.SHARED_LOGITS_SEARCH,
        "they act on the logits of each text, and all drafts share one row",
        "leave them out, or take beam",
    ),
    Rule(
        S.REJECTION,
        S.PROBABILITY_FREE_DRAFTER,
        "the walk needs the probabilities that drafts were drawn from",
        "use a draft model with the target's tokens, or the gumbel walk",
    ),
    Rule(
        S.REJECTION,
        S.ADAPTIVE_BUDGET,
        "auto drops drafts by what was drawn, which changes the distribution",
        "give a number of nodes",
    ),
    Rule(
        S.REJECTION,
        S.COMPARISON,
        "the walk keeps the distribution of the output, not its tokens; a statistical test checks "
        "it",
        "use --walk gumbel",
    ),
    Rule(
        S.REJECTION,
        S.TIMING,
        "outputs under a grammar are then not as long as plain decoding's",
        "leave the grammar out, or use --walk gumbel",
    ),
    Rule(
        S.LOSSY_DRAFTER,
        S.COMPARISON,
        "its output is not that of plain decoding",
        "leave the drafter out",
    ),
    Rule(
        S.PREDICTION,
        S.PREDICTION_FREE_DRAFTER,
        "nothing reads the prediction",
        "take a drafter that does, e.g. predicted_output",
    ),
    Rule(S.COMPARED_ANSWERS, S.GREEDY, "all answers are the same", "give a temperature"),
    Rule(
        S.COMPARED_ANSWERS,
        S.DETERMINING_WATERMARK,
        "the answers would hardly differ",
        "take the watermark exponential or green, or one answer",
    ),
    Rule(
        S.COMPARED_ANSWERS,
        S.STREAM,
        "all answers are compared before the first is sent",
        "leave stream out",
    ),
    Rule(S.PROMPT_SCORES, S.STREAM, "the scores come as a whole", "leave stream out"),
    Rule(
        S.SYSTEM_PROMPT,
        S.RAW_PROMPT,
        "only the chat template has a place for it",
        "leave raw or system out",
    ),
    Rule(S.GUIDE, S.OTHER_GUIDE, "no order is defined between them", "give one of them"),
    Rule(
        S.TOOLS,
        S.RULES,
        "rules cannot be mixed with those of calls",
        "give a JSON schema or a regular expression, or leave the tools out",
    ),
    Rule(
        S.GRAMMAR,
        S.NO_STOP_TOKEN,
        "a stop token ends the text where the grammar allows",
        "leave --ignore-eos out, or take a checkpoint that names a stop token",
    ),
    Rule(S.END_CONTROL, S.STOP_STRINGS, "the control cannot prevent stop strings"),
    Rule(
        S.FREQUENT_HEAD,
        S.OTHER_TOKENS,
        "such a draft must first guess the rest of a word, whatever it is",
        "leave head out",
    ),
    Rule(
        S.PARALLEL_DRAFTING,
        S.OTHER_TOKENS,
        "what such a draft guesses is tokenised anew",
        "leave schedule out",
    ),
    Rule(
        S.SEVERAL_DRAFTS,
        S.OTHER_TOKENS,
        "nested drafts share the tokens of the target",
        "name one draft",
    ),
    Rule(S.NATIVE, S.DEVICE, "it runs on the CPU", "leave the device out"),
    Rule(S.NATIVE, S.DUAL_CHUNK, "torch computes its scores", "add --engine reference"),
    Rule(S.STATIC, S.DUAL_CHUNK, "torch computes its scores", "add --engine reference"),
    Rule(S.PATTERN, S.DUAL_CHUNK, "patterns choose by distances that it changes"),
    Rule(S.GROUPED_KV, S.DUAL_CHUNK, "it scores single positions"),
    Rule(S.KV_POLICY, S.DUAL_CHUNK, "it scores positions that policies evict"),
    Rule(
        S.NATIVE,
        S.LOW_RANK_KV,
        "its kernels read neither factors nor outliers",
        "add --engine reference, or take kv_format int4 or int3",
    ),
    Rule(S.NATIVE, S.MASK_PATTERN, "torch computes its mask", "add --engine reference"),
    Rule(S.NATIVE, S.EXITS, "it runs a layer for all tokens of a pass", "add --engine reference"),
    Rule(
        S.REFERENCE,
        S.STREAMED_WEIGHTS,
        "torch holds all weights but neurons with ReLU, and layers that the format stored expands",
        "take the native engine, or leave weights_memory out",
    ),
    Rule(
        S.STATIC,
        S.STREAMED_WEIGHTS,
        "its passes need all weights on the device",
        "take the native engine, or leave weights_memory out",
    ),
    Rule(
        S.STATIC,
        S.PIPELINE,
        "its passes are recorded over all layers",
        "take the native engine, or leave pipeline out",
    ),
    Rule(
        S.PATTERN,
        S.PIPELINE,
        "the pattern compares layers, which then lie on several nodes",
        "leave pipeline or the pattern out",
    ),
    Rule(S.EXITS, S.PIPELINE, "the policy counts layers, which then lie on several nodes"),
    Rule(S.SEVERAL_MODELS, S.PIPELINE, "its nodes share the layers of one", "name one model"),
    Rule(
        S.NESTED_MEMORY,
        S.PIPELINE,
        "the memory is that of one process",
        "leave memory or pipeline out",
    ),
    Rule(
        S.PREFILL_APART,
        S.PIPELINE,
        "pages of keys and values then lie on several nodes",
        "leave one of the two numbers out",
    ),
    Rule(
        S.PREFILL_APART,
        S.PATTERN,
        "a replica hands over keys and values, and not what the pattern chooses among them",
        "leave prefill_replicas or the pattern out",
    ),
    Rule(
        S.PREFILL_APART,
        S.KV_POLICY,
        "what the policy drops depends on how the text was read, so that no prompt could go over",
        "leave prefill_replicas out, or let requests name their policy (kv_policy_choice)",
    ),
    Rule(
        S.PREFILL_APART,
        S.NESTED_MEMORY,
        "the memory is that of one process",
        "leave the memory or prefill_replicas out",
    ),
    Rule(S.REFERENCE, S.THREADS, "torch has threads of its own", "leave threads out"),
    Rule(
        S.REFERENCE,
        S.KV_FORMAT,
        "it caches keys and values in the format of its weights",
        "leave kv_format out, or take int4, int3 or gear",
    ),
    Rule(S.STATIC, S.PATTERN, "its passes read all positions", "add --engine reference"),
    Rule(S.STATIC, S.EXITS, "its passes run all layers", "add --engine reference"),
    Rule(S.STATIC, S.THREADS, "torch has threads of its own", "leave threads out"),
    Rule(
        S.STATIC,
        S.KV_FORMAT,
        "it caches keys and values in the format of its weights",
        "leave kv_format out",
    ),
)
del S

# What an engine must be able to do for what a method needs, and what to do where it cannot.
ENGINE_ABILITIES = {
    Ability.LAYERS: "run some layers only",
    Ability.POSITIONS: "attend to some positions only",
    Ability.TOKENS: "compute the logits of some tokens only",
    Ability.MIXTURES: "run weighted sums of token embeddings",
    Ability.HIDDEN: "return hidden states",
    Ability.ATTENTION_MASS: "sum the attention of cached positions",
    Ability.KEYS: "return cached keys and values",
    Ability.QUERIES: "keep the queries of the last positions",
    Ability.SURPRISAL: "keep the surprisal of committed tokens",
    Ability.STORED_PAGES: "hand out its cached keys and values",
    Ability.APPEND_ROWS: "take keys and values that were computed elsewhere",
    Ability.EVICT: "evict rows of its cache",
    Ability.GRADIENT: "differentiate its blocks",
    Ability.ENSEMBLE: "run several models as one",
}


def check(sides: Mapping[Side, str]) -> None:
    """Refuse a combination.

    Args:
        sides: what is combined; for each side the name of what has it, e.g. `the drafter lookup`.

    Raises:
        CombinationError: two sides do not go together; names both, the reason and what to do.
    """
    for rule in RULES:
        if rule.a in sides and rule.b in sides:
            raise CombinationError(
                f"{sides[rule.a]} and {sides[rule.b]} do not go together: {rule.reason}; "
                f"{rule.advice}"
            )


def check_needs(
    who: str, needs: Collection[Ability], engine: str, abilities: Collection[Ability]
) -> None:
    """Refuse an engine that lacks what a method needs.

    Args:
        who: the method, e.g. `the KV policy h2o`.
        needs: of the method; those that are no abilities of engines are not looked at.
        engine: name of the engine.
        abilities: of the engine.

    Raises:
        CombinationError: names both and what is lacking.
    """
    for ability, meaning in ENGINE_ABILITIES.items():
        if ability in needs and ability not in abilities:
            raise CombinationError(
                f"{who} and the engine {engine} do not go together: {who} needs an engine that can "
                f"{meaning}; take another engine, or leave {who} out"
            )
