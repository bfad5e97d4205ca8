"""Settings that contradict each other, each told in one line with its remedy."""

from dataclasses import replace
from typing import Any

from cotrain.finetune_settings import EvaluateConfig, FinetuneConfig
from cotrain.rationale_settings import EncodeConfig, GenerateConfig
from cotrain.run_settings import TRACKERS
from cotrain.settings import DataConfig, TeacherConfig


def contradictions(config: Any) -> list[str]:
    """Settings that are good each for itself and cannot hold together."""
    if isinstance(config, FinetuneConfig | EvaluateConfig):
        return _examples_contradictions(config) + _items_contradictions(config.data)
    if isinstance(config, GenerateConfig):
        return _rationale_contradictions(config) + _items_contradictions(config.data)
    if isinstance(config, EncodeConfig):
        return _encode_contradictions(config)
    problems = []
    student = config.student
    if student.architecture == "sasrec" and student.hidden_size % student.num_heads:
        problems.append(
            f"student.hidden_size {student.hidden_size} is not a multiple of student.num_heads "
            f"{student.num_heads}; change one of them."
        )
    train = config.train
    if config.distills and train.warmup_epochs >= train.epochs:
        taught = "the teacher" if config.has_teacher else "distill.rationales"
        problems.append(
            f"train.warmup_epochs {config.train.warmup_epochs} leaves no epoch of train.epochs "
            f"{config.train.epochs} to {taught}; lower the first or raise the second."
        )
    if config.distill.lambda_rdr and config.distill.rationales is None:
        problems.append(
            f"distill.lambda_rdr is {config.distill.lambda_rdr}, but distill.rationales is none; "
            "name the folder that scripts/encode_rationales.py wrote, or set it to 0."
        )
    if config.distill.lambda_rank == "auto" and config.distill.audit == "off":
        problems.append(
            "distill.lambda_rank is auto, but distill.audit is off, which it follows; set "
            "distill.audit warn, or a number for distill.lambda_rank."
        )
    blends = config.distill.target == "blend" and config.has_teacher
    if blends and not train.control:
        problems.append(
            "distill.target is blend, which is made with the control's scores (with the student's "
            "own, what the teacher adds would be added in every step), but train.control is false; "
            "set it to true, or distill.target teacher."
        )
    fits = blends and config.distill.blend_beta == "auto"
    if fits and config.distill.audit == "off":
        problems.append(
            "distill.target is blend and distill.blend_beta auto, but distill.audit is off, which "
            "fits it; set distill.audit warn, or a number for distill.blend_beta."
        )
    nearness = config.distill.ranker == "nearness"
    if config.student.item_text == "teacher" and (nearness or config.teacher.model is None):
        lacks = "distill.ranker is nearness" if nearness else "teacher.model is none"
        problems.append(
            f"student.item_text is teacher, but {lacks}; name a sentence encoder, or a teacher."
        )
    if nearness and train.rounds > 1:
        problems.append(
            f"train.rounds {train.rounds} trains the teacher between rounds, which distill.ranker "
            "nearness cannot be; set train.rounds 1, or distill.ranker llm."
        )
    if train.item_updates == "lazy" and train.loss in ("ce", "chunked_ce"):
        problems.append(
            f"train.item_updates is lazy, but train.loss {train.loss} touches every item in every "
            "step; set train.item_updates all, or a sampled loss."
        )
    if train.label_smoothing and train.loss not in ("ce", "chunked_ce"):
        problems.append(
            f"train.label_smoothing {train.label_smoothing} has no meaning for train.loss "
            f"{train.loss}; set it to 0, or train.loss chunked_ce."
        )
    unknown = [name for name in config.tracking.names if name not in TRACKERS]
    if unknown:
        problems.append(
            f"tracking.with names {', '.join(map(repr, unknown))}; expected of "
            f"{', '.join(TRACKERS)}, joined by commas, or none."
        )
    problems += _teacher_contradictions(config.teacher) + _rounds_contradictions(config)
    if config.distill.confidence == "agreement" and config.teacher.shuffles < 2:
        problems.append(
            f"distill.confidence is agreement, but teacher.shuffles {config.teacher.shuffles} "
            "gives one ranking a row; set teacher.shuffles to at least 2."
        )
    return problems + _items_contradictions(config.data)


def _rounds_contradictions(config: Any) -> list[str]:
    train, teacher = config.train, config.teacher
    if train.rounds == 1:
        return []
    if teacher.model is None:
        return [
            f"train.rounds {train.rounds} trains the teacher between rounds, but teacher.model is "
            "none; name one, or set train.rounds 1."
        ]
    problems, epochs = [], train.epochs - train.warmup_epochs
    if train.rounds > epochs > 0:
        problems.append(
            f"train.rounds {train.rounds} are more than the {epochs} epochs after "
            "train.warmup_epochs, of which each takes at least one; lower it, or raise "
            "train.epochs."
        )
    if config.query.when == "offline":
        problems.append(
            f"train.rounds {train.rounds} lets another teacher teach in each round, but query.when "
            "is offline: the first one would be asked for all of them; set query.when live, or "
            "train.rounds 1."
        )
    if teacher.mode not in ("direct", "cot"):
        problems.append(
            f"train.rounds {train.rounds} trains the teacher between rounds, which teacher.mode "
            f"{teacher.mode} has no way for; set teacher.mode direct or cot, or train.rounds 1."
        )
    if teacher.identifiers != "letters" or teacher.num_shown < teacher.num_candidates:
        problems.append(
            f"train.rounds {train.rounds} trains the teacher on one step that decides between all "
            "candidates; set teacher.identifiers letters and teacher.window none, or train.rounds "
            "1."
        )
    return problems


def _rationale_contradictions(config: GenerateConfig) -> list[str]:
    settings, problems = config.rationale, []
    if settings.select != "random" and settings.student is None:
        problems.append(
            f"rationale.select {settings.select} asks a trained student; name its folder with "
            "rationale.student, or set rationale.select random."
        )
    if settings.backend == "local" and config.teacher.model is None:
        problems.append(
            "rationale.backend is local, but teacher.model is none; name a model, or set "
            "rationale.backend endpoint."
        )
    if settings.backend == "endpoint" and settings.endpoint_model is None:
        problems.append(
            "rationale.backend is endpoint, but rationale.endpoint_model is none; name the model "
            "that the server offers."
        )
    if settings.top_p < 1 and settings.temperature == 0:
        problems.append(
            f"rationale.top_p {settings.top_p} has no meaning at rationale.temperature 0; leave it "
            "at 1, or raise the temperature."
        )
    if settings.min_words > settings.max_words:
        problems.append(
            f"rationale.min_words {settings.min_words} is above rationale.max_words "
            f"{settings.max_words}; exchange them."
        )
    return problems


def _encode_contradictions(config: EncodeConfig) -> list[str]:
    problems = []
    if config.rationales is None:
        problems.append(
            "rationales is not set; name the folder or the file that "
            "scripts/generate_rationales.py wrote."
        )
    if config.encoder == "teacher" and config.teacher.model is None:
        problems.append("encoder is teacher, but teacher.model is none; name a model.")
    return problems


def _examples_contradictions(config: FinetuneConfig | EvaluateConfig) -> list[str]:
    teacher, examples = config.teacher, config.examples
    if isinstance(config, FinetuneConfig) and teacher.search != "none":
        teacher = replace(teacher, mode="cot")  # the METHOD sets it, and only `cot` searches
    problems = _teacher_contradictions(teacher)
    if config.teacher.model is None:
        problems.append("teacher.model is none; name the language model.")
    if examples.candidates == "student" and examples.student is None:
        problems.append(
            "examples.candidates is student, but examples.student is none; name a run of "
            "scripts/train_online.py (with --teacher.model none for a plain one), or set "
            "examples.candidates popular."
        )
    return problems


def _items_contradictions(data: DataConfig) -> list[str]:
    problems = _split_contradictions(data)
    if data.items is not None and data.interactions is None:
        problems.append("data.items is set without data.interactions; set both, or neither.")
    return problems


def _teacher_contradictions(teacher: TeacherConfig) -> list[str]:
    problems = _itemwise_contradictions(teacher)
    labels = teacher.mode not in ("bigrec", "pointwise")
    if labels and teacher.identifiers == "letters" and teacher.num_shown > 26:
        problems.append(
            f"{teacher.num_shown} candidates in one prompt, but teacher.identifiers letters names "
            "at most 26; set teacher.window to at most 26, or teacher.identifiers numbers."
        )
    slides = teacher.num_shown < teacher.num_candidates
    if slides and teacher.stride is not None and teacher.stride >= teacher.num_shown:
        problems.append(
            f"teacher.stride {teacher.stride} moves a window past all of its {teacher.num_shown} "
            "candidates, so that none could rise from one window to the next; lower it, at best to "
            "half a window."
        )
    if teacher.search == "tree" and teacher.process_reward is None:
        problems.append(
            "teacher.search is tree, but teacher.process_reward is none; name the folder that "
            "scripts/train_teacher.py process-reward wrote, or set teacher.search self_consistency."
        )
    one_step = teacher.decision_position == "predict" and teacher.identifiers == "letters"
    if teacher.search != "none" and not one_step:
        problems.append(
            f"teacher.search {teacher.search} reads each verdict in one step; set "
            "teacher.decision_position predict and teacher.identifiers letters, or teacher.search "
            "none."
        )
    if teacher.search != "none" and teacher.mode != "cot":
        problems.append(
            f"teacher.search {teacher.search} has no meaning for teacher.mode {teacher.mode}; set "
            "teacher.mode cot, or leave teacher.search none."
        )
    if teacher.compute != "auto" and teacher.quantization in ("int8", "bf16"):
        problems.append(
            f"teacher.compute {teacher.compute} has no meaning for teacher.quantization "
            f"{teacher.quantization}; leave it auto, or set teacher.quantization nf4 or fp32."
        )
    return problems


def _itemwise_contradictions(teacher: TeacherConfig) -> list[str]:
    """In the modes that look at each candidate by itself."""
    problems, mode = [], teacher.mode
    if mode not in ("bigrec", "pointwise"):
        return problems
    if teacher.num_shown < teacher.num_candidates:
        problems.append(
            f"teacher.window has no meaning for teacher.mode {mode}, which looks at each candidate "
            "by itself; leave it none."
        )
    if teacher.decision_position == "emit":
        problems.append(
            f"teacher.decision_position emit has no meaning for teacher.mode {mode}, which writes "
            "no identifier; leave it predict."
        )
    if teacher.shuffles > 1:
        problems.append(
            f"teacher.shuffles {teacher.shuffles} has no meaning for teacher.mode {mode}, whose "
            "verdict is the same in any order of the candidates; leave it 1."
        )
    return problems


def _split_contradictions(data: DataConfig) -> list[str]:
    starts = {"validation_start": data.validation_start, "test_start": data.test_start}
    given = [f"data.{name}" for name, value in starts.items() if value is not None]
    if given and data.split != "time":
        return [
            f"{' and '.join(given)} set, but data.split is {data.split}; set data.split time, or "
            "leave them."
        ]
    if len(given) == 1:
        return [
            f"{given[0]} is set without the other start; set both data.validation_start and "
            "data.test_start, or neither."
        ]
    return []
