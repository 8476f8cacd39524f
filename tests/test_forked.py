"""The server of `forked.py`."""

from concurrent.futures import ThreadPoolExecutor

from forked import Forks


def test_clients_of_one_folder_share_a_server(forks: Forks) -> None:
    """Both at once, and the one that stays is served when the other has left."""
    other = Forks(forks.folder)
    assert other.server is None, "there was one"
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(lambda client: client.run([], module="run_jobs"), (forks, other)))
    assert [result.status for result in done] == [0, 0], done[0].output + done[1].output
    other.close()
    other.wait()
    assert forks.run([], module="run_jobs").status == 0
