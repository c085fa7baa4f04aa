"""The registry of GPU memory, with libmla's part played by the test: it needs no GPU to see what is registered when."""
import ctypes
import gc
import unittest
from unittest import mock

import mlad
from mlad import _libmla, arrays
from mlad.memory import Memory


class Device:
    """Pretended GPU memory: addresses that nobody reads."""

    def __init__(self, pointer, count, strides=None, read_only=False):
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": "<f4", "data": (pointer, read_only),
                                         "strides": strides, "version": 3, "stream": None}


class Registry(unittest.TestCase):
    def setUp(self):
        self.calls, self.busy, self.dropped = [], set(), []
        self.memory = Memory(None, self.dropped.append)
        patch = mock.patch.object(_libmla, "call", self.call)
        patch.start()
        self.addCleanup(patch.stop)

    def call(self, name, *arguments):
        if name == "mla_buffer_import_device":
            _, pointer, size, access, buffer = arguments
            ctypes.cast(buffer, ctypes.POINTER(ctypes.c_void_p))[0] = pointer + 1
            self.calls.append(("import", pointer, size, access))
        if name == "mla_buffer_free":
            if arguments[0] in self.busy:
                raise mlad.Error("in_use", "buffer", "a decode names it")
            self.calls.append(("free", arguments[0] - 1))

    def register(self, device, access="readwrite"):
        return self.memory.register(device, arrays.view(device, "x"), "x", access)

    def test_once_for_each_array_and_its_inside(self):
        whole, inside, beyond = Device(4096, 100), Device(4096 + 40, 90), Device(4096 + 40, 91)
        segment, offset = self.register(whole)
        self.assertEqual((segment.buffer, offset), (4097, 0))
        self.assertEqual(self.register(inside), (segment, 40))
        self.assertEqual(self.calls, [("import", 4096, 400, _libmla.READWRITE)])
        self.register(beyond)
        self.assertEqual(self.calls[1:], [("import", 4136, 364, _libmla.READWRITE)])
        with self.assertRaises(mlad.InvalidArgument):
            self.register(whole, "read")

    def test_ends_when_the_array_dies_and_no_decode_names_it(self):
        device = Device(4096, 100)
        segment, _ = self.register(device, "read")
        self.busy.add(4097)
        del device
        gc.collect()
        self.memory.sweep()
        self.assertEqual((self.dropped, self.calls), ([segment], [("import", 4096, 400, _libmla.READ)]))
        self.assertIsNone(self.memory.locate(arrays.view(Device(4096, 100), "x")))
        self.busy.clear()
        self.memory.sweep()
        self.assertEqual(self.calls[1:], [("free", 4096)])

    def test_another_array_at_the_same_address_is_registered_anew(self):
        device = Device(4096, 100)
        self.register(device)
        del device
        gc.collect()
        again = Device(4096, 50)
        self.register(again)
        self.assertEqual([call[0] for call in self.calls], ["import", "free", "import"])

    def test_what_cannot_be_shared(self):
        with self.assertRaises(mlad.InvalidArgument):
            self.register(Device(4096, 100, strides=(-4,)))


if __name__ == "__main__":
    unittest.main()
