#!/usr/bin/env python3
"""Make `data/samples/` (the quickstart's data) from the source distribution of vaderSentiment 3.3.2.

    pip download --no-deps --no-binary :all: -d dl vaderSentiment==3.3.2
    pip install pyarrow==26.0.1
    python tests/golden/make_samples.py dl/vaderSentiment-3.3.2.tar.gz data/samples

Writes movie_reviews.parquet (text, rating), vader_lexicon.tsv (token <TAB> mean valence) and LICENSE-vaderSentiment.txt.
Nothing is cleaned or filtered: rows keep the order and the spelling of the source.
"""
import argparse
import hashlib
import io
import pathlib
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
PACKAGE = "vaderSentiment-3.3.2"
ROWS = 10_605


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """Bytes of one archived file."""
    return archive.extractfile(name).read()


def movie_reviews(ground_truth: str) -> pa.Table:
    """Rows `id <TAB> mean rating of 20 people <TAB> text` as a table of text and rating."""
    rows = [line.split("\t", 2) for line in ground_truth.splitlines()]
    assert len(rows) == ROWS, f"expected {ROWS} rows, found {len(rows)}"
    return pa.table(
        {
            "text": pa.array([text.strip() for _, _, text in rows], pa.string()),
            "rating": pa.array([float(rating) for _, rating, _ in rows], pa.float32()),
        }
    )


def lexicon(text: str) -> str:
    """Lines `token <TAB> mean <TAB> standard deviation <TAB> raw ratings` cut to the first two columns."""
    return "".join("\t".join(line.split("\t")[:2]) + "\n" for line in text.splitlines() if line.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    args = parser.parse_args()

    data = args.sdist.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert digest == SDIST_SHA256, f"{args.sdist}: unexpected digest {digest}"
    sdist = tarfile.open(fileobj=io.BytesIO(data))
    ratings = tarfile.open(fileobj=io.BytesIO(member(sdist, f"{PACKAGE}/additional_resources/hutto_ICWSM_2014.tar.gz")))

    args.out.mkdir(parents=True, exist_ok=True)
    table = movie_reviews(member(ratings, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8"))
    pq.write_table(
        table,
        args.out / "movie_reviews.parquet",
        compression="zstd",
        compression_level=22,
        use_dictionary=["rating"],
        write_statistics=False,
    )
    words = lexicon(member(sdist, f"{PACKAGE}/vaderSentiment/vader_lexicon.txt").decode("utf-8"))
    (args.out / "vader_lexicon.tsv").write_text(words, encoding="utf-8", newline="\n")
    license_text = member(sdist, f"{PACKAGE}/LICENSE.txt").replace(b"\r\n", b"\n")
    (args.out / "LICENSE-vaderSentiment.txt").write_bytes(license_text)


if __name__ == "__main__":
    main()
