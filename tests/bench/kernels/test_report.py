"""The statistics, the floors, the shapes and the plot of compare.py, on numbers whose answers are known."""
import random
import statistics
import sys
import unittest
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent))
import plot     # noqa: E402
import report   # noqa: E402
import shapes   # noqa: E402

RUN = {"type": "run", "model": "NVIDIA H100 80GB HBM3", "ours": "mma", "peer": "A <peer>", "graphs": True,
       "full_edges": True, "read_gbps": 3158.0, "tflops": 790.0, "ceilings_measured": True}


def line(shape, ours, peer, agree=True):
    return {"type": "shape", "batch": shape["batch"], "heads": shape["heads"], "q_len": shape["q_len"],
            "seqlens": shape["seqlens"], "ours_ns": ours, "peer_ns": peer, "ours_alone_ns": ours, "peer_alone_ns": peer,
            "peer_prepare_ns": [3000.0], "agree": agree, "sm_mhz": [1980]}


class Statistics(unittest.TestCase):
    def test_interval_by_ranks(self):
        # From tables of the sign test: 6..8 values give the extremes, 9 the second, 20 the sixth.
        for n, k in ((6, 1), (7, 1), (8, 1), (9, 2), (12, 3), (20, 6), (25, 8), (101, 41)):
            self.assertEqual(report.interval(list(range(n, 0, -1))), [k, n + 1 - k], n)
        self.assertIsNone(report.interval([1, 2, 3, 4, 5]))

    def test_interval_covers(self):
        chance, hits = random.Random(1), 0
        for _ in range(2000):
            low, high = report.interval([chance.lognormvariate(0, 1) for _ in range(15)])
            hits += low <= 1 <= high
        self.assertGreaterEqual(hits / 2000, 0.94)
        self.assertLess(hits / 2000, 0.995)

    def test_geometric_mean_and_its_interval(self):
        self.assertAlmostEqual(report.geometric_mean([1, 4]), 2)
        self.assertEqual(report.mean_interval([[2.0] * 7, [0.5] * 9]), [1, 1])
        chance = random.Random(2)
        noisy = [[1.25 * chance.gauss(1, 0.02) for _ in range(9)] for _ in range(30)]
        low, high = report.mean_interval(noisy, 400)
        self.assertTrue(1.23 < low < 1.25 < high < 1.27, (low, high))


class Floors(unittest.TestCase):
    def test_known_floors(self):
        # design brief: us on an H100 at 3,158 GB/s and 790 TFLOP/s
        for numbers, floor, bound in (((10, 16, 1, 512), 1.98, "memory"), ((1, 16, 1, 50000), 18.25, "memory"),
                                      ((128, 128, 4, 8192), 1478.77, "matmul")):
            found = report.floor_us(shapes.uniform(*numbers), 3158, 790)
            self.assertAlmostEqual(found[0], floor, delta=0.011)
            self.assertEqual(found[1], bound)

    def test_a_ragged_batch_counts_its_own_keys(self):
        even, uneven = shapes.uniform(2, 16, 1, 1000), {**shapes.uniform(2, 16, 1, 1000), "seqlens": [1500, 500]}
        self.assertEqual(report.floor_us(even, 3000, 790), report.floor_us(uneven, 3000, 790))


class Shapes(unittest.TestCase):
    def test_ragged_set(self):
        found = shapes.ragged()
        self.assertEqual(found, shapes.ragged())
        self.assertEqual({(s["batch"], s["heads"], s["kv_len"]) for s in found},
                         {(b, h, k) for b in (32, 128) for h in (16, 128) for k in (2048, 8192)})
        for s in found:
            self.assertEqual(len(s["seqlens"]), s["batch"])
            self.assertGreaterEqual(min(s["seqlens"]), s["q_len"])
            if s["batch"] == 128:
                self.assertAlmostEqual(statistics.mean(s["seqlens"]) / s["kv_len"], 1, delta=0.15)
                self.assertAlmostEqual(statistics.stdev(s["seqlens"]) / s["kv_len"], 0.5, delta=0.1)

    def test_only(self):
        found = shapes.only(shapes.grid(), "B=1/10,H=16,K=512")
        self.assertEqual({(s["batch"], s["heads"], s["kv_len"]) for s in found}, {(1, 16, 512), (10, 16, 512)})
        self.assertEqual(shapes.only(found, ""), found)
        for wrong in ("X=1", "B", "B=x", "B=1,,H=2"):
            with self.assertRaises(ValueError):
                shapes.only(found, wrong)


class Report(unittest.TestCase):
    def setUp(self):
        self.shapes = [shapes.uniform(1, 16, 1, 512), shapes.uniform(1, 16, 2, 512), shapes.uniform(10, 16, 1, 512),
                       shapes.uniform(10, 16, 2, 512), shapes.uniform(10, 16, 4, 512), shapes.ragged()[0]]
        self.shapes[0]["recorded"] = {"h100_us": 10.0, "h200_us": 1.0}
        ours = [8000.0, 8100, 8200, 7900, 8000, 8050, 8000]
        faster, slower = [1.5 * t for t in ours], [0.9 * t for t in ours]
        self.lines = [RUN, line(self.shapes[0], ours, faster), line(self.shapes[1], ours, faster, agree=False),
                      line(self.shapes[2], ours, slower), line(self.shapes[5], ours, faster),
                      {**line(self.shapes[3], [], []), "type": "skipped", "why": "the time was over"}]
        self.report = report.build(self.shapes, self.lines)

    def test_pairs(self):
        first = self.report["shapes"][0]
        self.assertAlmostEqual(first["ratio"], 1.5)
        self.assertAlmostEqual(first["ratio_interval"][0], 1.5)
        self.assertAlmostEqual(first["ours_us"], 8.0)
        self.assertAlmostEqual(first["peer_of_recorded"], 1.2)
        self.assertAlmostEqual(first["peer_prepare_us"], 3.0)

    def test_wrong_and_missing_shapes_are_in_no_mean(self):
        groups = self.report["groups"]
        self.assertEqual({name: g["shapes"] for name, g in groups.items()},
                         {"B=1": 1, "B=10": 1, "all": 2, "ragged": 1})
        self.assertAlmostEqual(groups["B=1"]["ratio"], 1.5)
        self.assertAlmostEqual(groups["all"]["ratio"], (1.5 * 0.9) ** 0.5)
        self.assertEqual(self.report["slower"], ["B=10 H=16 q=1 K=512"])
        self.assertEqual([entry["name"] for entry in self.report["skipped"]], ["B=10 H=16 q=2 K=512"])
        self.assertEqual(len(self.report["failed"]), 2)
        self.assertIn("q=2 K=512", self.report["failed"][0])
        self.assertIn("no result", self.report["failed"][1])

    def test_a_ratio_is_of_its_pair(self):
        # The clock halves midway: times double, ratios do not.
        ours = [8.0, 8, 8, 16, 16, 16, 16]
        lines = [RUN, line(self.shapes[0], ours, [t * 1.2 for t in ours])]
        found = report.build(self.shapes[:1], lines)["shapes"][0]
        self.assertAlmostEqual(found["ratio_interval"][1], 1.2)

    def test_table_and_plot(self):
        text = report.table(self.report)
        for words in ("OUTPUTS DIFFER", "slower than the peer, beyond doubt: B=10", "skipped: B=10", "1980..1980 MHz"):
            self.assertIn(words, text)
        root = ElementTree.fromstring(plot.svg(self.report))
        dots = root.findall("{http://www.w3.org/2000/svg}circle")
        self.assertEqual(len(dots), 3 + 2 * 3)
        heights = {dot[0].text.split(":")[0]: float(dot.get("cy")) for dot in dots[:3]}
        self.assertLess(heights["B=1 H=16 q=1 K=512"], heights["B=10 H=16 q=1 K=512"])

    def test_without_a_peer(self):
        lines = [{**RUN, "peer": None}, {key: value for key, value in self.lines[1].items()
                                         if not key.startswith("peer") and key != "agree"}]
        found = report.build(self.shapes[:1], lines)
        self.assertNotIn("ratio", found["shapes"][0])
        self.assertEqual(found["failed"], [])
        report.table(found)
        self.assertEqual(len(ElementTree.fromstring(plot.svg(found)).findall("{http://www.w3.org/2000/svg}circle")), 1)


if __name__ == "__main__":
    unittest.main()
