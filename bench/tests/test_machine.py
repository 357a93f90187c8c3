from bench.machine import processor


def test_the_processor_and_what_it_can_do():
    info = "processor\t: 0\nmodel name\t: A Chip @ 2GHz\nflags\t\t: fpu avx2 avx512f sse\n\n"
    assert processor(info) == "A Chip @ 2GHz (avx2, avx512f)"
    assert processor("model name : Old\nflags : fpu\n") == "Old"
