"use strict";
(async () => {
  const element = (id) => document.getElementById(id);
  const state = element("viewer-state");
  const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const giveUp = (why) => {
    for (const id of ["viewer-controls", "viewer-frame", "viewer-legend"]) element(id).hidden = true;
    element("viewer-instead").hidden = false;
    state.textContent = `${why}: slices stand here in place of the viewer.`;
  };
  const fail = (error) => {
    console.error(error);
    giveUp("The viewer does not work here");
  };
  if (!document.createElement("canvas").getContext("webgl2")) return giveUp("This browser has no WebGL 2");
  if (typeof DecompressionStream === "undefined") return giveUp("This browser cannot unpack the viewer");

  const cases = JSON.parse(element("viewer-data").textContent);
  let viewer, shown;

  const load = async () => {
    const packed = new Blob([bytes(element("viewer-module").textContent)]);
    const source = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).blob();
    const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    const { Niivue } = await import(address);
    URL.revokeObjectURL(address);
    viewer = new Niivue({
      backColor: [0, 0, 0, 1], show3Dcrosshair: true, dragAndDropEnabled: false, isColorbar: false, logLevel: "error",
      isRadiologicalConvention: true, crosshairWidth: 1, crosshairWidthUnit: "mm", crosshairColor: [1, 1, 1, 0.8],
    });
    await viewer.attachToCanvas(element("canvas"), false);
  };

  const draw = () => {
    const chosen = Number(element("viewer-layer").value);
    const opacity = Number(element("viewer-opacity").value);
    for (let i = 1; i < shown.layers.length; i++) viewer.setOpacity(i, i === chosen ? opacity : 0);
    viewer.setSliceType(Number(element("viewer-view").value));
  };

  const show = async (index) => {
    shown = cases[index];
    await viewer.loadVolumes(shown.layers.map((layer, i) => ({
      url: bytes(layer.data),
      name: `layer${i}.nii.gz`,
      colormap: layer.kind === "score" ? "inferno" : "gray",
      opacity: i ? 0 : 1,
      cal_min: 0,
      cal_max: layer.kind === "labels" ? shown.colors.length : 255,
    })));
    const channel = (k) => [0, ...shown.colors.map((color) => color[k])];
    shown.layers.forEach((layer, i) => {
      if (layer.kind !== "labels") return;
      const opaque = [0, ...shown.colors.map(() => 255)];
      viewer.volumes[i].setColormapLabel({
        R: channel(0), G: channel(1), B: channel(2), A: opaque, labels: ["", ...shown.classes],
      });
    });
    viewer.updateGLVolume();
    viewer.scene.crosshairPos = viewer.mm2frac(shown.crosshair);
    const layers = element("viewer-layer");
    const before = layers.selectedOptions[0]?.textContent ?? "reference";
    layers.replaceChildren(...shown.layers.map((layer, i) => new Option(i ? layer.name : "nothing", i)));
    const again = [...layers.options].find((option) => option.textContent === before);
    layers.value = again ? again.value : "1";
    draw();
    state.textContent = shown.shrunk > 1 ? `Shown at 1/${shown.shrunk} of the resolution.` : "";
  };

  try {
    state.textContent = "The viewer starts …";
    for (const id of ["viewer-controls", "viewer-frame", "viewer-legend"]) element(id).hidden = false;
    element("viewer-case").replaceChildren(...cases.map((c, i) => new Option(c.title, i)));
    await load();
    await show(0);
    element("viewer-instead").hidden = true;
    element("viewer-case").addEventListener("change", (event) => show(Number(event.target.value)).catch(fail));
    for (const id of ["viewer-layer", "viewer-opacity", "viewer-view"]) element(id).addEventListener("input", draw);
  } catch (error) {
    fail(error);
  }
})();
