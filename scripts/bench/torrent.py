"""One end of a BitTorrent transfer, as a process of its own so that its CPU time can be told from the other's: TCP only,
no discovery, the client given the seed's address, every piece verified."""

import sys
import time


def session(lt, port):
    return lt.session({
        "listen_interfaces": f"127.0.0.1:{port}",
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_outgoing_utp": False,
        "enable_incoming_utp": False,
        "allow_multiple_connections_per_ip": True,
        "alert_mask": 0,
    })


def make(lt, path, torrent):
    import os

    storage = lt.file_storage()
    lt.add_files(storage, path)
    made = lt.create_torrent(storage, 1 << 20)
    lt.set_piece_hashes(made, os.path.dirname(path))
    with open(torrent, "wb") as file:
        file.write(lt.bencode(made.generate()))


def join(lt, torrent, folder, port, **more):
    params = lt.add_torrent_params()
    params.ti = lt.torrent_info(torrent)
    params.save_path = folder
    for name, value in more.items():
        setattr(params, name, value)
    own = session(lt, port)
    return own, own.add_torrent(params)


def seed(lt, torrent, folder):
    own, handle = join(lt, torrent, folder, 0)
    while not handle.status().is_seeding:
        time.sleep(0.05)
    print(own.listen_port(), flush=True)
    sys.stdin.read()


def fetch(lt, torrent, folder, port):
    own, handle = join(lt, torrent, folder, 0)
    handle.connect_peer(("127.0.0.1", int(port)))
    while not handle.status().is_seeding:
        time.sleep(0.005)
    # Written, not only received: the storage is released when everything is on disk.
    own.remove_torrent(handle)
    del own


if __name__ == "__main__":
    import libtorrent

    {"make": make, "seed": seed, "fetch": fetch}[sys.argv[1]](libtorrent, *sys.argv[2:])
