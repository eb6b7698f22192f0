"""Texts, or pairs of texts, of one's own with the class of each: CSV, JSON lines or parquet."""

from dfs_engine.data.config import DataConfig
from dfs_engine.data.draw import draw_share
from dfs_engine.data.tables import FORMATS, Classes, read_table, split_files, take
from dfs_engine.data.text import TextDataset, TextSplits, check_texts, load_tokenizer


def load_text_files(config: DataConfig, longest: int) -> TextSplits:
    """Reads and tokenises the files below `config.root`, or that one file.

    Args:
        longest: how many tokens the model can read.
    """
    text, label = config.text_columns() or ("text",), config.label_column or "label"
    expected = (
        f"files train* and val*, dev* or test*, or without such names, with columns {', '.join((*text, label))} "
        f"({', '.join(FORMATS)}; JSON by lines)"
    )
    root = config.folder(expected, or_file=True)
    tokenizer = load_tokenizer(config, longest)
    files = split_files(root, expected, FORMATS)
    tables = {name: read_table(paths, (*text, label), expected, text=text) for name, paths in files.items()}
    classes = Classes(tables["train"] if "train" in tables else tables["all"], label)
    samples = {}
    for name, table in tables.items():
        texts = [table.columns[column].to_pylist() for column in text]
        check_texts(texts, table.where)
        samples[name] = (texts, classes.of(table))
    how = ""
    if "all" in samples:
        texts, labels = samples.pop("all")
        kept, drawn = draw_share(labels, config.test_share(len(labels)), config.split_seed)
        for name, rows in (("train", kept), ("test", drawn)):
            samples[name] = ([take(column, rows) for column in texts], take(labels, rows))
        how = f" drawn by split_seed {config.split_seed}"
    train, test = (
        TextDataset(tokenizer, *samples[name], max_tokens=config.max_tokens, title=f"tokenising {name}")
        for name in ("train", "test")
    )
    description = f"text files {root} ({len(train)} train / {len(test)} test{how})"
    return TextSplits(train, test, {}, classes.names, ("top1",), description)
