"""How tiles are cut into jobs."""

from ntkgen.blocks import Block
from ntkgen.engine.jobs import JOB_SECONDS, TILES_PER_JOB, Job, diagonal_jobs, job_size, tile_jobs
from ntkgen.plan.order import Band
from ntkgen.plan.tiles import Tile


def test_jobs_hold_every_tile_once_and_none_spans_two_bands():
    tiles = [Tile(row, col) for row in range(6) for col in range(row, 6)]
    bands = [Band((Block(0, 3),), tuple(tiles[:11])), Band((Block(3, 6),), tuple(tiles[11:]))]
    for workers in (1, 2, 7):
        cut = list(tile_jobs(bands, job_size(len(tiles), workers, 1.0)))
        assert [tile for job in cut for tile in job.band.tiles] == tiles
        assert all(
            set(job.band.tiles) <= set(bands[0].tiles) or set(job.band.tiles) <= set(bands[1].tiles) for job in cut
        )
        assert all(job.band.held in {band.held for band in bands} for job in cut)
        assert len(cut) >= min(len(tiles), 2 * workers)


def test_many_tiles_are_cut_into_jobs_of_a_bounded_size():
    tiles = tuple(Tile(0, col) for col in range(10_000))
    cut = list(tile_jobs([Band((), tiles)], job_size(len(tiles), 2, 0.0)))
    assert max(job.size for job in cut) == TILES_PER_JOB
    slow = job_size(len(tiles), 2, tile_seconds=100.0)
    assert slow == JOB_SECONDS // 100
    assert job_size(len(tiles), 2, tile_seconds=1e6) == 1
    assert [job.size for job in diagonal_jobs(range(3), 1)] == [1, 1, 1]


def test_the_size_of_a_job_is_its_blocks_or_tiles():
    assert Job(indices=(1, 2)).size == 2
    assert Job(band=Band((), (Tile(0, 0),))).size == 1
