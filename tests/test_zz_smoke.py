def test_all(kodalle_run):
    print((kodalle_run / "log.jsonl").read_text())
