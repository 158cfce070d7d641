"""Read what a checkpoint declares around the decoder: each line of it is honoured, or refused by name.

It stands in modules.json and the files of the modules, config_sentence_transformers.json, sentence_bert_config.json,
config.json, tokenizer_config.json and chat_template.jinja, and is read as sentence-transformers 6 and transformers 5
read it. A checkpoint without modules.json declares nothing: it has the surroundings of the model cards.
"""

import re
import string
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from qwen3core.config import Qwen3Config, read_json
from qwen3core.errors import CheckpointError, check_one_of
from qwen3core.layout import SIMILARITIES, Dense, Layout, Normalize
from qwen3core.prompts import EOS

from .chat_template import read_template
from .find import base_directory

POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Names of modes by the flags of older files."""
ACTIVATIONS = (
    *("Identity", "Sigmoid", "Tanh", "ReLU", "ReLU6", "GELU", "SiLU", "Mish", "ELU", "SELU", "CELU", "LeakyReLU"),
    *("Softplus", "Softsign", "Hardtanh", "Hardswish", "Hardsigmoid", "LogSigmoid", "Tanhshrink"),
)
"""Classes of torch.nn without weights, each number by itself."""
JOBS = {
    "SentenceTransformer": "embedding",
    "CrossEncoder": "reranker",
    "MultiVectorEncoder": "late interaction",
    "ColBERT": "late interaction",
}
"""What a checkpoint is for, by ``model_type`` of config_sentence_transformers.json."""
STRUCTURED = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
"""Signs by which sentence-transformers tells that a chat template wants lists of parts."""
PYLATE = (
    *("query_length", "document_length", "query_prefix", "document_prefix", "skiplist_words", "query_expansion"),
    *("do_query_expansion", "attend_to_expansion_tokens", "attend_to_mask_tokens"),
)
"""Keys by which sentence-transformers tells that PyLate wrote a checkpoint, whose queries are filled up by default."""
NOT_VARIABLES = {
    *("chat_template", "tools", "documents", "continue_final_message", "tokenize", "return_dict", "restore_suffix"),
    *("padding", "truncation", "max_length", "return_tensors", "messages", "tokenizer_kwargs"),
}
"""Arguments of ``apply_chat_template`` that are no variables of the template."""
T = TypeVar("T")


def read_layout(directory: str | Path, *, job: str | None = None) -> Layout:
    """What a checkpoint declares. job: ``"embedding"`` or ``"reranker"`` where the files say something else or nothing.

    Raises CheckpointError for what is wrong, or not computed here; InputError for another job.
    """
    check_one_of("job", job, (None, "embedding", "reranker"))
    return _Reader(Path(directory)).read(job)


class _File:
    """A JSON file, empty where there is none; whatever is taken from it is checked."""

    def __init__(self, path: Path, *, required: bool = False) -> None:
        self.path = path
        self.data = read_json(path) if required or path.exists() else {}

    def get(self, key: str, kind: type[T], default: Any = None) -> Any:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.refuse(key, f"a value of type {kind.__name__}")
        return value

    def positive(self, key: str, default: int | None = None) -> Any:
        value = self.get(key, int, default)
        return value if value is None or value > 0 else self.refuse(key, "a positive number")

    def one_of(self, key: str, values: Any, default: Any = None) -> Any:
        value = self.data.get(key, default)
        return value if value in (None, *values) else self.refuse(key, f"one of {', '.join(map(str, values))}")

    def activation(self, default: str) -> str:
        """``activation_function`` or ``activation_fn``, the path of a class of torch."""
        key = "activation_function" if "activation_function" in self.data else "activation_fn"
        path = self.get(key, str, f"torch.nn.{default}")
        name = path.rpartition(".")[2]
        return name if path.startswith("torch.") and name in ACTIVATIONS else self.refuse(key, "a class of torch.nn")

    def only(self, *keys: str) -> "_File":
        """Refuse any other key, which may change numbers."""
        for key in self.data:
            if key not in keys:
                self.refuse(key, f"none but {', '.join(keys)}")
        return self

    def none_of(self, *keys: str) -> None:
        for key in keys:
            if self.data.get(key):
                self.refuse(key, "none: this does not compute it")

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {key}: expected {expected}, found {self.data.get(key)!r:.200}")


class _Reader:
    """The files of a checkpoint's directory, and the layout that they declare."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = _File(base_directory(directory) / "config.json", required=True)
        self.settings = _File(directory / "config_sentence_transformers.json")
        self.tokenizer = _File(directory / "tokenizer_config.json")
        self.transformer = _File(directory / "sentence_bert_config.json")
        self.tokenizer.none_of("split_special_tokens")
        self.modules = self._modules()
        if not self.modules:  # which sentence-transformers then does not read
            self.settings.data, self.transformer.data = {}, {}
        self.classifier = self.config.get("architectures", list) == ["Qwen3ForSequenceClassification"]

    def read(self, job: str | None) -> Layout:
        """The layout, for the declared job or for another."""
        declared = self._declared()
        causal = Qwen3Config.from_dict(self.config.data, str(self.config.path)).is_causal
        common: dict[str, Any] = {"job": job or declared, "causal": causal, "max_length": self._max_length()}
        if not self.modules or job not in (None, declared):
            return Layout(**common | (self._pairs() if job != "embedding" and not self.modules else {}))
        assert declared is not None
        rest = self.modules[1:]
        if declared == "reranker":
            return Layout(**common | self._transformer(declared, rest) | self._reranker(rest))
        common |= self._transformer(declared, rest) | self._embedding(declared)
        if declared == "embedding":
            common |= self._pooling(rest[0] if rest else ("nothing", ""))
            rest = rest[1:]
        else:
            common |= self._mask(rest)
            rest = [module for module in rest if module[0] != "MultiVectorMask"]
        modules = self._after(rest, declared, common["pooling"])
        normalize = bool(modules) and isinstance(modules[-1], Normalize)
        if declared == "late interaction" and not normalize and self.settings.data["model_type"] != "ColBERT":
            self._refuse_module("Normalize at the end", rest[-1][0] if rest else "nothing")
        return Layout(
            **common, modules=modules[:-1] if normalize else modules, normalize=normalize or not common["pooling"]
        )

    def _modules(self) -> list[tuple[str, str]]:
        """Class and folder of each module of modules.json; none where there is no such file."""
        path = self.directory / "modules.json"
        found = []
        for module in read_json(path, list) if path.exists() else []:
            kind, folder = (module.get(key) if isinstance(module, dict) else None for key in ("type", "path"))
            if not isinstance(kind, str) or not isinstance(folder, str):
                raise CheckpointError(f"{path}: expected modules with type and path, found {module!r:.200}")
            if not kind.startswith(("sentence_transformers.", "pylate.")):
                raise CheckpointError(
                    f"{path}: type: expected a module of sentence_transformers, found {kind!r}: its code may compute "
                    "something else"
                )
            found.append((kind.rpartition(".")[2], folder))
        if path.exists() and (not found or found[0] != ("Transformer", "")):
            raise CheckpointError(f"{path}: expected a Transformer in the path '' first, found {found[:1]}")
        return found

    def _declared(self) -> str | None:
        if self.modules:
            if self.modules[-1][0] == "LogitScore":
                return "reranker"
            return JOBS[self.settings.one_of("model_type", JOBS) or "SentenceTransformer"]
        if self.classifier:
            return "reranker"
        generation = _File(self.directory / "generation_config.json")
        return "chat" if generation.get("do_sample", bool) else None

    def _max_length(self) -> int | None:
        """Of tokenizer_config.json, where it is less than the model's limit (transformers writes 1e30 for none)."""
        length = self.tokenizer.data.get("model_max_length")
        if length is not None and (not isinstance(length, int | float) or isinstance(length, bool) or length < 1):
            self.tokenizer.refuse("model_max_length", "a positive number")
        return int(length) if length is not None and length < 2**31 else None

    def _transformer(self, job: str, rest: list[tuple[str, str]]) -> dict[str, Any]:
        """What sentence_bert_config.json says of texts and of the decoder's output."""
        file = self.transformer.only(
            *("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"),
            *("processing_kwargs", "unpad_inputs", "query_length", "document_length", "query_expansion"),
            *("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"),
        )
        file.none_of("query_expansion", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
        for key in ("model_args", "model_kwargs"):
            if set(file.get(key, dict, {})) - {"dtype", "torch_dtype", "attn_implementation", "device_map"}:
                file.refuse(key, "a dtype or nothing")
        processing = file.get("processing_kwargs", dict, {})
        own = processing.get("chat_template", {})
        if set(processing) - {"chat_template"} or not isinstance(own, dict) or set(own) & NOT_VARIABLES:
            file.refuse("processing_kwargs", "variables of the chat template alone")
        scored = "none" if job != "reranker" else rest[0][0] if rest else "score"
        task = {"LogitScore": "text-generation", "score": "sequence-classification"}.get(scored, "feature-extraction")
        file.one_of("transformer_task", [task])
        output = "last_hidden_state" if task == "feature-extraction" else "logits"
        modality = {"text": {"method": "forward", "method_output_name": output}}
        modality = file.get("modality_config", dict, modality)
        texts = "message" if job == "reranker" else "text"
        found = {key: value for key, value in modality.items() if key == texts or job != "reranker"}
        if set(found) != {texts} or not isinstance(found[texts], dict):
            file.refuse("modality_config", f"{texts!r}" + (": pairs in a chat template" if texts == "message" else ""))
        if (found[texts].get("method"), found[texts].get("method_output_name")) != ("forward", output):
            file.refuse("modality_config", f"{texts!r} of the method 'forward' and its {output!r}")
        return {
            "max_length": file.positive("max_seq_length", self._max_length()),
            "lower_case": file.get("do_lower_case", bool, False),
        }

    def _prompts(self) -> dict[str, str]:
        prompts = self.settings.get("prompts", dict, {})
        if not all(isinstance(text, str | None) for text in prompts.values()):
            self.settings.refuse("prompts", "an object of texts")
        return {name: text or "" for name, text in prompts.items()}

    def _embedding(self, job: str) -> dict[str, Any]:
        """Prompts and similarity; prefixes of PyLate come before the prompts."""
        prompts = self._prompts()
        for name in ("query", "document") if job == "late interaction" else ():
            if prefix := self.settings.get(f"{name}_prefix", str):
                prompts[name] = prefix + prompts.get(name, "").removeprefix(prefix)
        similarities = SIMILARITIES[4:] if job == "late interaction" else SIMILARITIES[:4]
        return {
            "prompts": prompts,
            "default_prompt_name": self.settings.one_of("default_prompt_name", {"query", "document", *prompts}),
            "truncate_dim": self.settings.positive("truncate_dim"),
            "similarity": self.settings.one_of("similarity_fn_name", SIMILARITIES, similarities[0]),
        }

    def _pooling(self, module: tuple[str, str]) -> dict[str, Any]:
        name, folder = module
        if name != "Pooling":
            self._refuse_module("Pooling", name)
        file = _File(self.directory / folder / "config.json", required=True)
        file.only("embedding_dimension", "word_embedding_dimension", "pooling_mode", "include_prompt", *POOLINGS)
        for key in ("embedding_dimension", "word_embedding_dimension"):
            file.one_of(key, [self.config.get("hidden_size", int)])
        flags = [mode for key, mode in POOLINGS.items() if file.get(key, bool)]
        modes = file.data.get("pooling_mode") or flags or ["mean"]
        modes = [modes] if isinstance(modes, str) else modes
        if not isinstance(modes, list) or not set(map(str, modes)) <= set(POOLINGS.values()):
            file.refuse("pooling_mode", f"one or more of {', '.join(POOLINGS.values())}")
        found = {"pooling": tuple(modes), "include_prompt": file.get("include_prompt", bool, True)}
        return found if found["include_prompt"] else found | {"special_tokens": self._special_tokens()}

    def _special_tokens(self) -> tuple[str, ...]:
        name = "extra_special_tokens" if "extra_special_tokens" in self.tokenizer.data else "additional_special_tokens"
        extra = self.tokenizer.get(name, list, [])
        return (*self._named_tokens().values(), *map(_content, extra))

    def _mask(self, rest: list[tuple[str, str]]) -> dict[str, Any]:
        """Which tokens of a late-interaction checkpoint count."""
        said = self.settings.data
        legacy = said["model_type"] == "ColBERT"
        off = said.get("do_query_expansion") is False or ("query_expansion" in said and not said["query_expansion"])
        if (legacy or any(key in said for key in PYLATE)) and not off:
            self.settings.refuse("do_query_expansion", "false: queries are not filled up here")
        lengths = {}
        for key in ("query_length", "document_length"):
            lengths[key] = self.transformer.positive(key, self.settings.positive(key))
        folder = next((folder for name, folder in rest if name == "MultiVectorMask"), None)
        file = self.settings if folder is None else _File(self.directory / folder / "config.json")
        if folder is not None:
            file.only("skiplist_words", "skiplist_tasks", "keep_only_token_ids").none_of("keep_only_token_ids")
            file.one_of("skiplist_tasks", ["document", ["document"]])
        words = file.get("skiplist_words", list, list(string.punctuation) if legacy else [])
        if not all(isinstance(word, str) for word in words):
            file.refuse("skiplist_words", "texts")
        return {"pooling": (), "skiplist": tuple(words), **lengths}

    def _after(self, rest: list[tuple[str, str]], job: str, pooling: tuple[str, ...]) -> tuple[Dense | Normalize, ...]:
        """The modules on vectors."""
        feature = "token_embeddings" if job == "late interaction" else "sentence_embedding"
        width = self.config.positive("hidden_size") * max(1, len(pooling))
        modules: list[Dense | Normalize] = []
        for i, (name, folder) in enumerate(rest):
            file = _File(self.directory / folder / "config.json")
            output = "scores" if job == "reranker" and i == len(rest) - 1 else feature
            if name == "Dropout":  # nothing, except in training
                continue
            if name not in ("Dense", "Normalize") or (name == "Dense" and not re.fullmatch(r"\d\w*", folder)):
                self._refuse_module("Normalize, or Dense in a folder like 2_Dense", f"{name} in {folder!r}")
            name_in = feature if name == "Dense" else "sentence_embedding"  # where the file does not say, as of PyLate
            name_in = file.data.get("module_input_name") or name_in
            if name_in != feature:
                file.refuse("module_input_name", feature)
            if (file.data.get("module_output_name") or name_in) != output:
                file.refuse("module_output_name", output)
            if name == "Normalize":
                modules.append(Normalize())
                continue
            file.only(
                *("in_features", "out_features", "bias", "activation_function", "use_residual"),
                *("module_input_name", "module_output_name"),
            )
            if file.data.get("in_features") != width:
                file.refuse("in_features", f"{width}, the size of what comes before")
            flags = {key: file.get(key, bool, default) for key, default in (("bias", True), ("use_residual", False))}
            width = file.positive("out_features") or file.refuse("out_features", "a positive number")
            modules.append(Dense(folder, file.data["in_features"], width, activation=file.activation("Tanh"), **flags))
        return tuple(modules)

    def _reranker(self, rest: list[tuple[str, str]]) -> dict[str, Any]:
        """Head, template and instruction of a CrossEncoder."""
        default = self.settings.get("default_prompt_name", str)
        prompts = self._prompts()
        if default is not None and default not in prompts:
            self.settings.refuse("default_prompt_name", f"one of {', '.join(prompts) or 'no prompts'}")
        common = self._template(prompts[default] or None if default else None)
        if [name for name, _ in rest] == ["LogitScore"]:
            file = _File(self.directory / rest[0][1] / "config.json", required=True)
            file.only("true_token_id", "false_token_id", "module_input_name")
            file.one_of("module_input_name", ["causal_logits"])
            ids = [file.get(key, int) for key in ("true_token_id", "false_token_id")]
            if ids[0] is None or min(i for i in ids if i is not None) < 0:
                file.refuse("true_token_id", "a token's id")
            if self.settings.activation("Identity") not in ("Identity", "Sigmoid"):
                self.settings.refuse("activation_fn", "Identity or Sigmoid: the score is a probability here")
            return {**common, "answers": tuple(i for i in ids if i is not None)}
        if not rest and self.classifier:
            return common | self._labels()
        pooling = self._pooling(rest[0] if rest else ("nothing", ""))
        modules = self._after(rest[1:], "reranker", pooling["pooling"])
        if not modules or not isinstance(modules[-1], Dense):
            self._refuse_module("a Dense that gives the score", rest[-1][0])
        labels = tuple(f"LABEL_{i}" for i in range(modules[-1].out_features))
        return {**common, **pooling, "modules": modules, "score": "modules"} | self._activation(labels)

    def _pairs(self) -> dict[str, Any]:
        """Of a checkpoint without modules.json: its head, and its template, if that has the roles of a pair."""
        source, _ = self._chat_template()
        own = source is not None and all(re.search(f"""["']{role}["']""", source) for role in ("query", "document"))
        found = self._template(None) if own else {}
        return found | (self._labels() if self.classifier else {})

    def _labels(self) -> dict[str, Any]:
        """The outputs of a sequence classification."""
        names = self.config.get("id2label", dict, {})
        count = self.config.positive("num_labels", len(names) or 2)
        if names and sorted(names) != sorted(map(str, range(count))):
            self.config.refuse("id2label", f"a name for each number below {count}")
        labels = tuple(str(names.get(str(i), f"LABEL_{i}")) for i in range(count))
        return {"score": "score"} | self._activation(labels)

    def _activation(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """What a score passes through: sentence-transformers' default is a sigmoid of a single one."""
        file = self.settings
        if "activation_fn" not in file.data:
            file = _File(self.config.path)
            stored = file.get("sentence_transformers", dict, {}).get("activation_fn")
            file.data = {"activation_fn": stored or file.get("sbert_ce_default_activation_function", str)}
        return {"labels": labels, "activation": file.activation("Sigmoid" if len(labels) == 1 else "Identity")}

    def _named_tokens(self) -> dict[str, str]:
        """Special tokens by name; one that is not set is no variable of a template: it renders as nothing."""
        defaults = dict.fromkeys(("eos_token", "pad_token", "unk_token"), EOS)
        names = (*defaults, "bos_token", "sep_token", "cls_token", "mask_token")
        found = {name: self.tokenizer.data.get(name, defaults.get(name)) for name in names}
        return {name: _content(token) for name, token in found.items() if token is not None}

    def _chat_template(self) -> tuple[str | None, Path]:
        """The template's source, and where it stands: a file of its own wins."""
        path = self.directory / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text("utf-8"), path
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"{path}: expected a template in UTF-8, found something else ({error})"
                ) from error
        stored = self.tokenizer.data.get("chat_template")
        if isinstance(stored, list):
            stored = next((t["template"] for t in stored if isinstance(t, dict) and t.get("name") == "default"), None)
        return stored if isinstance(stored, str) else None, self.tokenizer.path

    def _template(self, instruction: str | None) -> dict[str, Any]:
        source, path = self._chat_template()
        if source is None:
            raise CheckpointError(f"{self.directory}: expected chat_template.jinja, the template of pairs, found none")
        own = self.transformer.get("processing_kwargs", dict, {}).get("chat_template", {})
        variables: dict[str, Any] = {"add_generation_prompt": False, **self._named_tokens(), **own}
        message = self.transformer.get("modality_config", dict, {}).get("message", {})
        form = message.get("format", "auto")
        if form not in ("auto", "flat", "structured"):
            self.transformer.refuse("modality_config", "a message's format of auto, flat or structured")
        structured = form == "structured" or (form == "auto" and any(sign in source for sign in STRUCTURED))
        found = read_template(source, variables, instruction, structured=structured, where=str(path))
        return dict(zip(("template", "instruction"), found, strict=True))

    def _refuse_module(self, expected: str, found: str) -> NoReturn:
        raise CheckpointError(f"{self.directory / 'modules.json'}: expected {expected}, found {found}")


def _content(token: Any) -> str:
    """The text of a token, which may be an object with its settings."""
    return str(token.get("content") if isinstance(token, dict) else token)
