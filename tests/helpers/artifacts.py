"""A small artifact."""

from pathlib import Path

from pipeline.core.artifact import Version, stage


def publish(root: Path, text: str = "content", keep: int = 2, kind: str = "mllm") -> Version:
    with stage(root, kind) as staging:
        (staging.path / "adapter").mkdir()
        (staging.path / "adapter" / "weights.bin").write_text(text * 50)
        (staging.path / "notes.txt").write_text(text)
        return staging.publish({"backbone": "tiny", "text": text}, keep=keep)
