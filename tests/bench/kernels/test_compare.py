"""compare.py and mlad-kernel-compare over the fake driver: a peer that is right, one that is not, and none.

usage: test_compare.py FOLDER, with the program and the peers"""
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from xml.etree import ElementTree

HERE, BUILT = Path(__file__).resolve().parent, Path(sys.argv[1]).resolve()
DEVICE = "GPU-fa4e0000-0000-4000-8000-000000000000"
SHAPES = [{"batch": 1, "heads": 2, "q_len": 1, "kv_len": 64, "h100_us": 9.0},
          {"batch": 2, "heads": 4, "q_len": 2, "kv_len": 70},
          {"batch": 1, "heads": 3, "q_len": 1, "kv_len": 64}]


def run(*words, shapes=SHAPES):
    """Exit status, report, standard error."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "shapes.json").write_text(json.dumps(shapes))
        done = subprocess.run(
            [sys.executable, HERE / "compare.py", "--program", BUILT / "mlad-kernel-compare", "--device", DEVICE,
             "--shapes", folder / "shapes.json", "--sets", "uniform", "--cold-mb", "0.2", "--ceilings", "3000,790",
             "--limit-seconds", "90", "--pairs", "2", "--most-pairs", "2", "--out", folder / "out.json", "--plot",
             folder / "out.svg", *words],
            capture_output=True, text=True, timeout=100)
        if not (folder / "out.json").exists():
            return done.returncode, None, done.stderr
        ElementTree.parse(folder / "out.svg")
        return done.returncode, json.loads((folder / "out.json").read_text()), done.stderr


class Compare(unittest.TestCase):
    def test_a_peer_that_is_right(self):
        status, report, errors = run("--peer", BUILT / "libtest_peer_right.so")
        self.assertEqual(status, 0, errors)
        self.assertEqual(report["run"]["peer"], "reference")
        self.assertEqual([entry["name"] for entry in report["skipped"]], ["B=1 H=3 q=1 K=64"])
        self.assertIn("three heads are not taken", report["skipped"][0]["why"])
        self.assertEqual(len(report["shapes"]), 2)
        for entry in report["shapes"]:
            samples = len(entry["ours_ns"])
            self.assertEqual(samples, 2)
            for who in ("ours", "peer"):
                self.assertEqual(len(entry[f"{who}_ns"]), samples)
                self.assertEqual(len(entry[f"{who}_alone_ns"]), samples)
                self.assertGreater(min(entry[f"{who}_ns"] + entry[f"{who}_alone_ns"]), 0)
            self.assertEqual(len(entry["ours_layer_ns"]), samples)
            self.assertGreater(min(entry["ours_layer_ns"]), 0)
            self.assertNotIn("peer_layer_ns", entry)
            self.assertEqual(len(entry["peer_prepare_ns"]), 7)
            self.assertNotIn("ours_prepare_ns", entry)
            self.assertTrue(entry["agree"])
            self.assertLess(entry["out_difference"], 0.06)
            # 0.2 MB are passed by 3 of 73,728 bytes, and two there are at least
            self.assertEqual(entry["copies"], 3 if entry["batch"] == 1 else 2)
            self.assertEqual(entry["calls"], 16)
        self.assertEqual(report["groups"]["all"]["shapes"], 2)

    def test_a_peer_that_looks_at_fewer_keys_is_caught(self):
        status, report, errors = run("--peer", BUILT / "libtest_peer_wrong.so", "--only", "H=2/4")
        self.assertEqual(status, 1)
        self.assertEqual([entry["agree"] for entry in report["shapes"]], [False, False])
        self.assertEqual(report["groups"], {})
        self.assertEqual(len(report["failed"]), 2)
        self.assertIn("computes something else", errors)

    def test_without_a_peer(self):
        status, report, errors = run("--only", "B=1,H=2")
        self.assertEqual(status, 0, errors)
        self.assertIsNone(report["run"]["peer"])
        self.assertNotIn("peer_ns", report["shapes"][0])

    def test_shapes_beyond_the_limit_are_skipped(self):
        status, report, errors = run("--limit-seconds", "0.1", shapes=[{**SHAPES[0], "heads": h} for h in range(4, 40)])
        self.assertEqual(status, 0, errors)
        self.assertGreater(len(report["skipped"]), 0)
        self.assertEqual({entry["why"] for entry in report["skipped"]}, {"limit-seconds: the time was over"})
        self.assertEqual(len(report["skipped"]) + len(report["shapes"]), 36)

    def test_what_cannot_be_run_says_why(self):
        for words, remedy in ((("--peer", "/nowhere.so"), "name a library by its path"),
                              (("--peer", "libcuda.so.1"), "exports no mlad_peer"),
                              (("--device", "cpu"), "give a GPU's UUID"),
                              (("--pairs", "0"), "give a number from 1"),
                              (("--only", "B=7"), "no shape is left"),
                              (("--only", "B"), "give B, H, q or K")):
            status, report, errors = run(*words)
            self.assertNotEqual(status, 0)
            self.assertIsNone(report)
            self.assertIn(remedy, errors)
        status, report, errors = run(shapes=[{**SHAPES[0], "q_len": 8, "kv_len": 7}])
        self.assertIn("from Q_LEN to 16777216", errors)


unittest.main(argv=sys.argv[:1])
