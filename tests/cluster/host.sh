# Makes the namespaces that it runs in a host of its own: a root folder, a network address, a user `moiety` without root, and
# sshd as process 1. `unshare --net --mount --pid --uts --ipc --fork` runs it. It ends with its standard input.
#
# Arguments: name, address, a folder with `home` and `authorized_keys`, the model, and folders that are seen at the same path.
set -eu
name=$1 address=$2 folder=$3 model=$4
shift 4

hostname "$name"
root=$folder/root
mkdir -p "$root"
mount -t tmpfs none "$root"
for path in /bin /lib* /opt /sbin /sys /usr; do
    if [ -L "$path" ]; then
        cp -P "$path" "$root$path"
    elif [ -d "$path" ]; then
        mkdir "$root$path"
        mount --rbind "$path" "$root$path"
    fi
done
for path in "$@"; do
    mkdir -p "$root$path"
    mount --bind "$path" "$root$path"
done
cd "$root"
mkdir -p dev home/moiety models proc run/sshd tmp var/empty var/tmp
chmod 1777 tmp var/tmp
mount -t proc none proc
mount --rbind /dev dev
mount -t tmpfs -o mode=1777 none dev/shm
mount --bind "$folder/home" home/moiety
cp -r "$model" models/moiety
chmod -R a+rX models

cp -a /etc etc
sed -i '/^moiety:/d; /^sshd:/d' etc/passwd etc/group
echo "moiety:*:1500:1500::/home/moiety:/bin/bash" >>etc/passwd
echo "sshd:*:1501:65534::/run/sshd:/usr/sbin/nologin" >>etc/passwd
echo "moiety:x:1500:" >>etc/group
printf '127.0.0.1 localhost\n%s %s\n' "$address" "$name" >etc/hosts
cp etc/skel/.profile etc/skel/.bashrc home/moiety/
mkdir -m 700 home/moiety/.ssh
cp "$folder/authorized_keys" home/moiety/.ssh/
chown -R 1500:1500 home/moiety
ssh-keygen -q -t ed25519 -N '' -f run/host_key
cat >run/sshd_config <<END
ListenAddress $address
HostKey /run/host_key
UsePAM no
PasswordAuthentication no
PidFile none
END

ip link set lo up
until ip addr show dev cable 2>/dev/null | grep -q "inet $address/"; do sleep 0.05; done
# Closing the standard input stops sshd. The kernel then ends every other process of the namespace.
exec 3<&0
(cat <&3 >/dev/null; kill 1) &
exec chroot . /usr/sbin/sshd -D -e -f /run/sshd_config </dev/null
