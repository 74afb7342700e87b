# What `cargo xtask try` runs in the guest, with $1 the folder of the programs: pinfoldd on both DAX
# file systems, three commands to type, and a prompt.
export PATH="$1:$PATH" PINFOLD_SERVER=http://127.0.0.1:7350
log="$TMPDIR/pinfoldd.log"
mkdir "$PINFOLD_LAB_EXT4/logs" "$PINFOLD_LAB_XFS/logs"
mkfifo "$TMPDIR/listening"
pinfoldd --export "ext4=$PINFOLD_LAB_EXT4/logs" --export "xfs=$PINFOLD_LAB_XFS/logs" \
    >"$TMPDIR/listening" 2>"$log" &
read -r line <"$TMPDIR/listening" || { cat "$log"; exit 1; }
cat <<END

$line, on two DAX file systems, with the soft NIC rxe0. Its log: $log
Try:

  pinfold put /etc/services ext4/services     # pin, one-sided writes, commit, unpin
  pinfold pin ext4/services --hold &          # hold a pin, then let somebody truncate the file:
  : > $PINFOLD_LAB_EXT4/logs/services

More: pinfold --help. Leaving the shell ends the guest.

END
shift
exec "$@"
